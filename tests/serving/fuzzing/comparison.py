"""Compares a response of the server with what it must be."""

from collections.abc import Sequence

import numpy as np

from serving.protocol.tensors import DATATYPES, Array
from tests.serving.fuzzing.oracle import Output, split_strings


def difference(output: Output, datatype: str, shape: tuple[int, ...], data: bytes) -> str | None:
    """Returns how an output of the server differs from what it must be; None if it does not.

    Args:
        data: the tensor's bytes.
    """
    if (datatype, shape) != (output.datatype, output.shape):
        return f"output {output.name}: {datatype} {shape}, expected {output.datatype} {output.shape}"
    got = to_array(datatype, shape, data)
    if got is None:
        return f"output {output.name}: {len(data)} bytes do not fit its shape {shape}"
    if output.classes:
        is_right = _are_classes(output, got)
    elif got.dtype == np.bool_:  # any byte but 0 is true
        is_right = np.array_equal(got.view(np.uint8) != 0, output.array.view(np.uint8) != 0)
    elif got.dtype == object:
        is_right = list(got.ravel()) == list(output.array.ravel())
    elif np.ndim(output.tolerance) == 0 and output.tolerance == 0:
        is_right = np.array_equal(got, output.array, equal_nan=got.dtype.kind == "f")
    else:
        is_right = _is_near(got, output)
    return None if is_right else f"output {output.name}: {got.tolist()}, expected {output.array.tolist()}"


def to_array(datatype: str, shape: tuple[int, ...], data: bytes) -> Array | None:
    """Returns the tensor in these bytes; None if their number does not match the shape."""
    kind = DATATYPES[datatype]
    count = int(np.prod(shape))
    if kind.size:
        return np.frombuffer(data, kind.dtype).reshape(shape) if len(data) == count * kind.size else None
    elements = split_strings(data)
    if elements is None or len(elements) != count:
        return None
    array = np.empty(count, object)
    array[:] = elements
    return array.reshape(shape)


def _is_near(got: Array, output: Output) -> bool:
    """Returns whether the numbers are near. Where sums overflow, the result depends on the order of the terms."""
    with np.errstate(all="ignore"):
        limit = np.broadcast_to(output.tolerance, got.shape).astype(np.float64)
        is_known = np.isfinite(output.array) & (limit < 1e30)
        return bool(np.all(~is_known | (np.abs(got.astype(np.float64) - output.array) <= limit)))


def _are_classes(output: Output, got: Array) -> bool:
    """Returns whether the strings are the largest values of each row, largest first."""
    rows = output.array.reshape(output.shape[0] if len(output.shape) == 2 else 1, -1).astype(np.float64)
    if not np.isfinite(rows).all():
        return True
    return all(
        _are_largest(row, list(strings), output.labels)
        for row, strings in zip(rows, got.reshape(len(rows), -1), strict=True)
    )


def _are_largest(row: Array, strings: Sequence[bytes], labels: Sequence[str]) -> bool:
    """Returns whether the strings `value:index:label` are the largest values of a row."""
    margin = 1e-3 + 1e-4 * np.abs(row).max(initial=0)
    largest = np.sort(row)[::-1]
    seen = set()
    for place, string in enumerate(strings):
        value, index, *label = string.decode().split(":", 2)
        number = int(index)
        seen.add(number)
        if label != list(labels[number : number + 1]):
            return False
        if max(abs(float(value) - row[number]), abs(row[number] - largest[place])) > margin:
            return False
    return len(seen) == len(strings)
