"""Converts arrays to requests and responses to arrays. Knows no channel."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from protos import grpc_service_pb2 as pb
from serving.client.errors import invalid_argument, invalid_response
from serving.errors import ServingError
from serving.protocol.tensors import DATATYPES, Array, Datatype, to_array, to_bytes

MAX_PART_BYTES = 3 << 20
"""Size of the parts of a large request. gRPC servers accept 4 MiB by default."""

_BY_DTYPE = {datatype.dtype: datatype for datatype in DATATYPES.values()}


def as_array(name: str, value: Any) -> Array:
    """Converts an input to an array in this machine's byte order; strings and bytes to an array of `bytes` objects.

    Raises:
        ClientError: it cannot be converted, or the protocol has no such data type.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind in "US":
            array = np.array(value, object)  # not from `array`, which has lost zero bytes at the end
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, and tensors that only their library knows
        raise invalid_argument(f"input {name!r} cannot be converted to an array: {error}") from error
    if array.dtype == object:
        return _encoded(name, array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    _datatype(name, array)
    return array


def add_inputs(base: pb.ModelInferRequest, arrays: Mapping[str, Array]) -> pb.ModelInferRequest:
    """Returns a copy of a request with inputs added in raw form."""
    request = pb.ModelInferRequest()
    request.CopyFrom(base)
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=_datatype(name, array).name, shape=array.shape)
        request.raw_input_contents.append(to_bytes(array))
    return request


def read_outputs(response: pb.ModelInferResponse) -> dict[str, Array]:
    """Returns the arrays of a response by name. They are read-only views of the response where possible.

    Raises:
        ClientError: shapes, data types and contents contradict each other.
    """
    raw: Sequence[bytes | None] = list(response.raw_output_contents) or [None] * len(response.outputs)
    try:
        return {output.name: _read(output, content) for output, content in zip(response.outputs, raw, strict=True)}
    except (ServingError, ValueError, OverflowError) as error:
        raise invalid_response(error) from error


def num_rows(arrays: Mapping[str, Array]) -> int:
    """Returns the size of the first dimension if all inputs agree in it, else 0."""
    sizes = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    return sizes.pop() if len(sizes) == 1 else 0


def split_rows(arrays: Mapping[str, Array], limit: int) -> Iterator[Mapping[str, Array]]:
    """Yields inputs of one row or more in parts of at most `limit` rows and, unless a row is larger, MAX_PART_BYTES."""
    total = num_rows(arrays)
    ends = np.cumsum(sum(_row_bytes(array, total) for array in arrays.values()))
    first = 0
    while first < total:
        before = ends[first - 1] if first else 0
        num_fitting = int(np.searchsorted(ends, before + MAX_PART_BYTES, side="right")) - first
        end = first + min(limit, max(1, num_fitting))
        yield {name: array[first:end] for name, array in arrays.items()}
        first = end


def concatenate(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Returns the outputs of consecutive parts as writable arrays.

    Raises:
        ClientError: they do not go together.
    """
    if len(parts) == 1:
        return {name: array.copy() for name, array in parts[0].items()}
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except (KeyError, ValueError) as error:
        raise invalid_response(f"the outputs of parts of the input differ: {error}") from error


def _row_bytes(array: Array, total: int) -> Array:
    if array.dtype != object:
        return np.full(total, array.nbytes // total)
    return np.array([sum(map(len, row)) for row in array.reshape(total, -1)])


def _read(output: pb.ModelInferResponse.InferOutputTensor, raw: bytes | None) -> Array:
    datatype, shape = DATATYPES.get(output.datatype), tuple(output.shape)
    if datatype is None or (raw is None and datatype.contents is None):
        raise ValueError(f"output {output.name!r} has data type {output.datatype}, which this client cannot read")
    if min(shape, default=0) < 0:
        raise ValueError(f"output {output.name!r} has shape {list(shape)}")
    if raw is not None:
        return to_array(datatype, shape, raw)
    elements = getattr(output.contents, str(datatype.contents))
    return np.array(list(elements), datatype.dtype).reshape(shape)


def _encoded(name: str, array: Array) -> Array:
    encoded = np.empty(array.size, object)
    for index, element in enumerate(array.ravel()):
        if not isinstance(element, bytes | str):
            kind = type(element).__name__
            raise invalid_argument(f"input {name!r} has an element of type {kind}: strings and bytes become BYTES")
        try:
            encoded[index] = element if isinstance(element, bytes) else element.encode()
        except UnicodeEncodeError as error:
            raise invalid_argument(f"input {name!r} has a string that is not UTF-8: {element!r}") from error
    return encoded.reshape(array.shape)


def _datatype(name: str, array: Array) -> Datatype:
    if array.dtype not in _BY_DTYPE:
        raise invalid_argument(
            f"input {name!r}: the protocol has no data type for {array.dtype}; convert the array first"
        )
    return _BY_DTYPE[array.dtype]
