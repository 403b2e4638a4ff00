"""The outputs of a batch: checked against the model's configuration, and converted to bytes once."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from serving.errors import ResourceExhausted
from serving.protocol.tensors import Array, TensorSpec, to_bytes

MAX_RESPONSE_BYTES = 2**31 - 1 - (1 << 20)
"""Bytes of the tensors in one response: the limit of Protocol Buffers, less a megabyte for names and shapes."""

_OBJECT_BYTES = 64
"""Of a string's object, beside its content."""


class OutputMismatch(Exception):
    """A backend returned something else than the outputs that the configuration describes."""


class OutputChecker:
    """Checks what a backend returns, on every batch: about 0.3 µs for each output."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._expected = [(spec, spec.datatype.dtype, spec.shape[1:]) for spec in specs]

    def check(self, arrays: Any, rows: int | None) -> None:
        """Checks that these are the configured outputs.

        Args:
            rows: size of the batch dimension; None for a model without one.

        Raises:
            OutputMismatch: names the expected and the received value.
        """
        if not isinstance(arrays, (list, tuple)) or len(arrays) != len(self._expected):
            raise OutputMismatch(f"expected a list of {len(self._expected)} arrays, got {_describe(arrays)}")
        for (spec, dtype, row_shape), array in zip(self._expected, arrays, strict=True):
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise OutputMismatch(f"the model's output {describe_mismatch(spec, array, rows)}")
            shape = array.shape
            fits = spec.accepts(shape) if rows is None else shape[:1] == (rows,)
            if not fits or (shape[1:] != row_shape and not spec.accepts(shape)):
                raise OutputMismatch(f"the model's output {describe_mismatch(spec, array, rows)}")


class Outputs:
    """The outputs of a batch. Converts each tensor to bytes once, however many requests share it.

    Args:
        rows: size of the batch dimension; None for a model without one, whose outputs belong to a single request.

    Attributes:
        row_shapes: the outputs' shapes without the batch dimension.
        is_large: whether a response may be too large, so that `check_size` must be called.
    """

    __slots__ = ("_bytes", "_rows", "arrays", "is_large", "row_shapes")

    def __init__(self, arrays: Sequence[Array], rows: int | None) -> None:
        self.arrays = arrays
        self.row_shapes = [array.shape if rows is None else array.shape[1:] for array in arrays]
        self._rows = rows or 1
        self.is_large = sum([array.nbytes for array in arrays]) > MAX_RESPONSE_BYTES
        self._bytes: list[bytes | None] = [None] * len(arrays)

    def check_size(self, indices: Iterable[int], rows: int) -> None:
        """Checks that these outputs fit into one response. Strings are counted as pointers.

        Raises:
            ResourceExhausted: they do not.
        """
        size = sum(self.arrays[index].nbytes for index in indices) // self._rows * rows
        if size > MAX_RESPONSE_BYTES:
            raise ResourceExhausted(
                f"the response would have {size} bytes, but at most {MAX_RESPONSE_BYTES} fit into a message: "
                "send fewer rows, or request fewer outputs"
            )

    def slice(self, index: int, first_row: int, rows: int) -> Array:
        """Returns some rows of an output."""
        return self.arrays[index] if rows == self._rows else self.arrays[index][first_row : first_row + rows]

    def data(self, index: int, first_row: int, rows: int) -> bytes:
        """Returns the bytes of some rows of an output, as in `serving.protocol.tensors`."""
        whole = self._bytes[index]
        if whole is None:
            array = self.arrays[index]
            if array.dtype == object:
                return to_bytes(self.slice(index, first_row, rows))
            whole = self._bytes[index] = array.tobytes()
        if rows == self._rows:
            return whole
        row_size = len(whole) // self._rows
        return whole[first_row * row_size : (first_row + rows) * row_size]

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors. Strings are counted with their objects."""
        total = 0
        for array in self.arrays:
            total += array.nbytes
            if array.dtype == object:
                total += sum(len(element) + _OBJECT_BYTES for element in array.ravel().tolist())
        return total

    def part(self, first_row: int, rows: int) -> "Outputs":
        """Returns some rows as outputs of their own, which do not keep the batch in memory."""
        arrays: list[Array] = []
        encoded: list[bytes | None] = []
        for index, array in enumerate(self.arrays):
            own = self.slice(index, first_row, rows)
            data = None
            if array.dtype == object:
                own = own.copy()
            else:
                data = self.data(index, first_row, rows)
                own = np.frombuffer(data, array.dtype).reshape(own.shape)
            arrays.append(own)
            encoded.append(data)
        part = Outputs(arrays, None)
        part.row_shapes, part._rows, part._bytes = self.row_shapes, rows, encoded
        return part


def describe_mismatch(spec: TensorSpec, array: object, rows: int | None) -> str:
    """Returns how an array differs from a tensor's configuration."""
    shape = spec.shape if rows is None else (rows, *spec.shape[1:])
    return (
        f"'{spec.name}' is {_describe(array)}, but the configuration says {spec.datatype.name} of shape {list(shape)}"
    )


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {list(value.shape)}"
    length = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
    return f"{type(value).__name__}{length}"
