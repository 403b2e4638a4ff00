"""The proof that an instance works, before a caller sees it: every batch size runs, and the answers are right."""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from serving.backends import Backend
from serving.errors import LoadError
from serving.models.config import ModelSpec
from serving.protocol.tensors import Array, TensorSpec

_LONG_S = 0.1
"""A run that takes so long is not made longer by much by what else the machine does."""


def warm_up(backend: Backend, spec: ModelSpec, golden: Mapping[str, Array]) -> int:
    """Run every batch size that is a power of two, and the largest: the first run of a size is the slow one.

    The largest comes first, so that memory pools take all that they will need in one piece. Each runs several times:
    torch compiles on the second run what it saw on the first, and the fastest run is what a size costs. A model with
    strings, or with open sizes besides the batch, is warmed with golden inputs alone: made-up ones could be wrong.

    Returns:
        the largest number of rows that costs, by row, at most a twentieth more than the cheapest: on CPUs, larger
        batches fall out of the caches. The largest batch where nothing could be measured.

    Raises:
        LoadError: the model fails, or its outputs are not what the configuration says.
    """
    if not all(tensor.name in golden or _can_be_made_up(tensor, spec) for tensor in spec.inputs):
        return spec.max_batch_size
    row_s: dict[int, float] = {}
    for rows in _batch_sizes(spec.max_batch_size):
        inputs = [_sample(tensor, golden.get(tensor.name), rows) for tensor in spec.inputs]
        row_s[rows or 0] = _fastest_s(backend, spec, inputs, rows) / (rows or 1)
    return max(rows for rows, seconds in row_s.items() if seconds <= 1.05 * min(row_s.values()))


def check_golden(backend: Backend, spec: ModelSpec, golden: Mapping[str, Array], tolerance: float) -> None:
    """Hold the answers against those of the model that was trained.

    Args:
        golden: inputs and right answers by tensor name; none for no check.
        tolerance: the largest difference of two numbers.

    Raises:
        LoadError: they differ by more, or the golden batch is not one of this model.
    """
    if not golden:
        return
    if missing := [tensor.name for tensor in spec.inputs if tensor.name not in golden]:
        raise LoadError(f"the golden batch has no input '{missing[0]}'")
    expected = {index: golden[tensor.name] for index, tensor in enumerate(spec.outputs) if tensor.name in golden}
    if not expected:
        raise LoadError(f"the golden batch has none of the outputs {[tensor.name for tensor in spec.outputs]}")
    for rows, part in _parts(spec, golden):
        inputs = [np.ascontiguousarray(golden[tensor.name][part]) for tensor in spec.inputs]
        outputs = _run(backend, spec, inputs, rows)
        for index, right in expected.items():
            _compare(spec.outputs[index].name, outputs[index], right[part], tolerance)


def _batch_sizes(max_batch_size: int) -> list[int | None]:
    """Largest first; None alone for a model without a batch dimension."""
    if not max_batch_size:
        return [None]
    powers = (2**exponent for exponent in range(max_batch_size.bit_length()))
    return sorted({*powers, max_batch_size}, reverse=True)


def _parts(spec: ModelSpec, golden: Mapping[str, Array]) -> Iterator[tuple[int | None, slice]]:
    """The golden batch in pieces that the model takes: number of rows and where."""
    if not spec.max_batch_size:
        yield None, slice(None)
        return
    total = min((golden[tensor.name].shape or (0,))[0] for tensor in spec.inputs)
    if not total:
        raise LoadError("the golden batch has no rows")
    for start in range(0, total, spec.max_batch_size):
        end = min(total, start + spec.max_batch_size)
        yield end - start, slice(start, end)


def _can_be_made_up(tensor: TensorSpec, spec: ModelSpec) -> bool:
    return tensor.datatype.size > 0 and -1 not in tensor.shape[1 if spec.max_batch_size else 0 :]


def _sample(tensor: TensorSpec, golden: Array | None, rows: int | None) -> Array:
    """Golden rows over and over, or zeros."""
    if golden is None:
        return np.zeros(tensor.shape if rows is None else (rows, *tensor.shape[1:]), tensor.datatype.dtype)
    return golden if rows is None else np.resize(golden, (rows, *golden.shape[1:]))


def _fastest_s(backend: Backend, spec: ModelSpec, inputs: Sequence[Array], rows: int | None) -> float:
    """Seconds of the fastest of five runs, or of three where they are long."""
    runs_s: list[float] = []
    while len(runs_s) < 3 or (len(runs_s) < 5 and min(runs_s) < _LONG_S):
        began = time.perf_counter()
        _run(backend, spec, inputs, rows)
        runs_s.append(time.perf_counter() - began)
    return min(runs_s)


def _run(backend: Backend, spec: ModelSpec, inputs: Sequence[Array], rows: int | None) -> list[Array]:
    """Run a batch and see whether the outputs are as declared."""
    for tensor, array in zip(spec.inputs, inputs, strict=True):
        _check_array("the golden input", tensor, array, rows)
    try:
        outputs = backend.run(inputs)
    except Exception as error:  # whatever a backend throws
        of_rows = "" if rows is None else f" on a batch of {rows} rows"
        raise LoadError(f"the model fails{of_rows}: {str(error).strip().partition(chr(10))[0]}") from error
    for tensor, array in zip(spec.outputs, outputs, strict=True):
        _check_array("the model's output", tensor, array, rows)
    return outputs


def _check_array(what: str, tensor: TensorSpec, array: Array, rows: int | None) -> None:
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    expected = TensorSpec(tensor.name, tensor.datatype, shape)
    if array.dtype != tensor.datatype.dtype or not expected.accepts(array.shape):
        raise LoadError(
            f"{what} '{tensor.name}' is {array.dtype} of shape {list(array.shape)}, and the configuration says "
            f"{tensor.datatype.name} of shape {list(shape)}"
        )


def _compare(name: str, answer: Array, right: Array, tolerance: float) -> None:
    if answer.shape != right.shape:
        raise LoadError(f"the golden '{name}' has shape {list(right.shape)}, the model's answer {list(answer.shape)}")
    if answer.dtype == object or right.dtype.kind not in "biuf":
        raise LoadError(f"the golden '{name}' cannot be compared: it holds no numbers")
    difference = float(np.max(np.abs(answer.astype(np.float64) - right), initial=0.0))
    if not difference <= tolerance:  # NaN differs too
        raise LoadError(
            f"the golden batch is answered wrong: '{name}' differs by {difference:.3g}, more than {tolerance:g}"
        )
