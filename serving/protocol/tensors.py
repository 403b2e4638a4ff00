"""Tensors on the wire: data types, shapes and bytes. Knows no model and no transport.

A tensor's bytes are little-endian and row-major without padding; an element of BYTES is a 4-byte length and then that
many bytes (Open Inference Protocol, "Tensor Data").
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.errors import InvalidArgument

assert sys.byteorder == "little", "tensors are little-endian on the wire and in memory"

Buffer = bytes | bytearray | memoryview
Shape = tuple[int, ...]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Datatype:
    """A data type of the protocol.

    Args:
        name: the protocol's, such as `FP32`.
        dtype: numpy's; object (of bytes) for BYTES.
        size: bytes an element; 0 for BYTES.
        contents: the field of InferTensorContents that holds its elements; None where there is only the raw form.
        config_name: the name in model configurations.
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
    """An input or an output of a model.

    Args:
        shape: with the batch dimension in front if the model batches; -1 where any size will do.
    """

    name: str
    datatype: Datatype
    shape: Shape

    def accepts(self, shape: Shape) -> bool:
        """Whether a tensor of this shape fits."""
        return len(shape) == len(self.shape) and all(
            want in (-1, have) for want, have in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Elements:
    """A tensor that came element by element: cheap to count, dear to turn into bytes."""

    datatype: Datatype
    values: Sequence[Any]

    def to_bytes(self, shape: Shape) -> bytes:
        """As it would go over the wire; nothing is converted before the number is right.

        Raises:
            InvalidArgument: the elements are not as many as the shape needs, or one does not fit the data type.
        """
        if len(self.values) != num_elements(shape):
            raise InvalidArgument(
                f"expected {num_elements(shape)} {self.datatype.name} elements for shape {list(shape)}, "
                f"got {len(self.values)}"
            )
        return from_elements(self.datatype, self.values)


def num_elements(shape: Shape) -> int:
    """Python's own integers: a huge declared shape does not overflow, and nothing is allocated for it."""
    return math.prod(shape)


def to_array(datatype: Datatype, shape: Shape, data: Buffer) -> Array:
    """The tensor in those bytes: read-only and without a copy, but for BYTES.

    Raises:
        InvalidArgument: BYTES whose lengths do not add up.
        ValueError: the number of bytes is not the shape's; callers check that first, with the tensor's name.
    """
    if datatype.size:
        return np.frombuffer(data, datatype.dtype).reshape(shape)
    elements = _split_strings(data)
    if len(elements) != num_elements(shape):
        raise InvalidArgument(
            f"expected {num_elements(shape)} BYTES elements for shape {list(shape)}, got {len(elements)}"
        )
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def to_bytes(array: Array) -> bytes:
    """The tensor as it goes over the wire."""
    if array.dtype != object:
        return array.tobytes()
    parts = []
    for element in array.ravel():
        encoded = element if isinstance(element, bytes) else str(element).encode()
        parts += [len(encoded).to_bytes(4, "little"), encoded]
    return b"".join(parts)


def from_elements(datatype: Datatype, elements: Sequence[Any]) -> bytes:
    """A flat sequence of numbers, bools, or strings and bytes, as it would go over the wire.

    Raises:
        InvalidArgument: an element does not fit the data type.
    """
    try:
        if not datatype.size:
            return to_bytes(np.array([_as_bytes(element) for element in elements], object))
        return np.fromiter(elements, datatype.dtype, len(elements)).tobytes()
    except (OverflowError, ValueError, TypeError) as error:
        raise InvalidArgument(f"an element is no {datatype.name}: {error}") from error


def _as_bytes(element: Any) -> bytes:
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        return element.encode()
    raise TypeError(f"{element!r} is neither a string nor bytes")


def _split_strings(data: Buffer) -> list[bytes]:
    view = memoryview(data)
    elements: list[bytes] = []
    at = 0
    while at < len(view):
        start = at + 4
        end = start + int.from_bytes(view[at:start], "little")
        if start > len(view) or end > len(view):
            raise InvalidArgument(
                f"BYTES tensor is cut off: element {len(elements)} needs {end - at} bytes, {len(view) - at} are left"
            )
        elements.append(bytes(view[start:end]))
        at = end
    return elements
