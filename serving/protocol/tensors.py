"""Data types, shapes and bytes of tensors on the wire. Knows no model and no front end.

A tensor's bytes are little-endian and row-major, without padding; an element of BYTES is a 4-byte length followed by
that many bytes
(https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md#tensor-data).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.errors import InvalidArgument, quote

assert sys.byteorder == "little", "tensors are copied between the wire and memory without swapping bytes"

MAX_RANK = 32
"""Of a shape. No model comes near, and multiplying a million dimensions takes minutes."""
MAX_STRINGS = 1_000_000
"""Elements of one BYTES tensor: each costs ten times the four bytes that it takes at least."""

_PIECE = 65_536

Buffer = bytes | bytearray | memoryview
Shape = tuple[int, ...]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Datatype:
    """A data type of the protocol.

    Args:
        name: in the protocol, such as `FP32`.
        dtype: numpy's data type; object (holding bytes) for BYTES.
        size: bytes of an element; 0 for BYTES.
        contents: the field of InferTensorContents that holds the elements; None if there is only the raw form.
        config_name: in model configurations, such as `TYPE_FP32`.
    """

    name: str
    dtype: np.dtype[Any]
    size: int
    contents: str | None
    config_name: str


DATATYPES: dict[str, Datatype] = {
    name: Datatype(name, np.dtype(dtype), 0 if name == "BYTES" else np.dtype(dtype).itemsize, contents, config)
    for name, dtype, contents, config in (
        ("BOOL", np.bool_, "bool_contents", "TYPE_BOOL"),
        ("UINT8", np.uint8, "uint_contents", "TYPE_UINT8"),
        ("UINT16", np.uint16, "uint_contents", "TYPE_UINT16"),
        ("UINT32", np.uint32, "uint_contents", "TYPE_UINT32"),
        ("UINT64", np.uint64, "uint64_contents", "TYPE_UINT64"),
        ("INT8", np.int8, "int_contents", "TYPE_INT8"),
        ("INT16", np.int16, "int_contents", "TYPE_INT16"),
        ("INT32", np.int32, "int_contents", "TYPE_INT32"),
        ("INT64", np.int64, "int64_contents", "TYPE_INT64"),
        ("FP16", np.float16, None, "TYPE_FP16"),
        ("FP32", np.float32, "fp32_contents", "TYPE_FP32"),
        ("FP64", np.float64, "fp64_contents", "TYPE_FP64"),
        ("BYTES", np.object_, "bytes_contents", "TYPE_STRING"),
    )
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a model.

    Args:
        shape: begins with the batch dimension if the model batches; -1 for any size.
    """

    name: str
    datatype: Datatype
    shape: Shape

    def accepts(self, shape: Shape) -> bool:
        """Returns whether a tensor may have this shape."""
        return len(shape) == len(self.shape) and all(
            want in (-1, have) for want, have in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Elements:
    """A tensor given as single elements: cheap to count, expensive to convert to bytes."""

    datatype: Datatype
    values: Sequence[Any]

    def __len__(self) -> int:
        return len(self.values)

    def to_bytes(self, shape: Shape) -> bytes:
        """Returns the tensor's bytes. Checks the number of elements before it converts them.

        Raises:
            InvalidArgument: the number of elements does not match the shape, or one does not fit the data type.
        """
        if len(self.values) != num_elements(shape):
            raise InvalidArgument(
                f"expected {num_elements(shape)} {self.datatype.name} elements for shape {list(shape)}, "
                f"got {len(self.values)}"
            )
        return from_elements(self.datatype, self.values)


def num_elements(shape: Shape) -> int:
    """Returns the number of elements, as a Python integer: it cannot overflow, however large a client's shape is."""
    return math.prod(shape)


def to_array(datatype: Datatype, shape: Shape, data: Buffer) -> Array:
    """Returns the tensor in these bytes; without a copy and read-only, except for BYTES.

    Raises:
        InvalidArgument: the lengths or the number of BYTES elements do not match the data or the shape.
        ValueError: the number of bytes does not match the shape; callers check it first.
    """
    if datatype.size:
        return np.frombuffer(data, datatype.dtype).reshape(shape)
    expected = num_elements(shape)
    if expected > MAX_STRINGS:
        raise InvalidArgument(f"a BYTES tensor of {expected} elements is too large: at most {MAX_STRINGS} are accepted")
    elements = _split_strings(data, expected)
    if len(elements) != expected:
        raise InvalidArgument(f"expected {expected} BYTES elements for shape {list(shape)}, got {len(elements)}")
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def to_bytes(array: Array) -> bytes:
    """Returns the tensor's bytes."""
    if array.dtype != object:
        return array.tobytes()
    parts = []
    for element in array.ravel():
        encoded = element if isinstance(element, bytes) else str(element).encode()
        parts += [len(encoded).to_bytes(4, "little"), encoded]
    return b"".join(parts)


def from_elements(datatype: Datatype, elements: Sequence[Any]) -> bytes:
    """Returns the bytes of a tensor given as a flat sequence of numbers, bools, or strings and bytes.

    Raises:
        InvalidArgument: an element does not fit the data type.
    """
    try:
        if not datatype.size:
            return to_bytes(np.array([_as_bytes(element) for element in elements], object))
        # In pieces: neither conversion lets another thread run before it ends.
        pieces = (elements[start : start + _PIECE] for start in range(0, len(elements), _PIECE))
        if datatype.name == "UINT8":
            return b"".join(map(bytes, pieces))  # twice as fast as numpy, for the type of images
        with np.errstate(over="raise"):
            return b"".join([np.fromiter(piece, datatype.dtype, len(piece)).tobytes() for piece in pieces])
    except (ArithmeticError, ValueError, TypeError) as error:
        raise InvalidArgument(f"an element does not fit {datatype.name}: {error}") from error


def _as_bytes(element: Any) -> bytes:
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        return element.encode()
    raise TypeError(f"{quote(element)} is neither a string nor bytes")


def _split_strings(data: Buffer, expected: int) -> list[bytes]:
    view = memoryview(data)
    elements: list[bytes] = []
    position = 0
    while position < len(view):
        if len(elements) == expected:
            raise InvalidArgument(f"expected {expected} BYTES elements, and {len(view) - position} bytes are left")
        start = position + 4
        end = start + int.from_bytes(view[position:start], "little")
        if start > len(view) or end > len(view):
            raise InvalidArgument(
                f"BYTES tensor is cut off: element {len(elements)} needs {end - position} bytes, "
                f"{len(view) - position} are left"
            )
        elements.append(bytes(view[start:end]))
        position = end
    return elements
