"""Arrays into requests and answers into arrays. Knows no channel."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from protos import grpc_service_pb2 as pb
from serving.client.errors import ClientError, invalid
from serving.errors import ServingError
from serving.protocol.tensors import DATATYPES, Array, Datatype, to_array, to_bytes

MAX_PART_BYTES = 3 << 20
"""Of a request that can be sent in parts. gRPC's servers take 4 MiB if nobody tells them otherwise."""

_BY_DTYPE = {datatype.dtype: datatype for datatype in DATATYPES.values()}


def as_array(name: str, value: Any) -> Array:
    """The value as an array that can travel: strings and bytes as objects.

    Raises:
        ClientError: its dtype is none of the protocol's.
    """
    array = np.asarray(value)
    if array.dtype.kind in "US":
        array = array.astype(object)
    _datatype(name, array)
    return array


def with_inputs(base: pb.ModelInferRequest, arrays: Mapping[str, Array]) -> pb.ModelInferRequest:
    """A copy of a request, with these inputs in raw form."""
    request = pb.ModelInferRequest()
    request.CopyFrom(base)
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=_datatype(name, array).name, shape=array.shape)
        request.raw_input_contents.append(to_bytes(array))
    return request


def outputs_of(response: pb.ModelInferResponse) -> dict[str, Array]:
    """The arrays of an answer, raw or typed; read-only, in part without a copy.

    Raises:
        ClientError: shapes, types and bytes do not belong together.
    """
    raw: Sequence[bytes | None] = list(response.raw_output_contents) or [None] * len(response.outputs)
    try:
        return {output.name: _read(output, content) for output, content in zip(response.outputs, raw, strict=True)}
    except (ServingError, KeyError, ValueError, AttributeError) as error:
        raise ClientError("INTERNAL", f"the server's answer makes no sense: {error}") from error


def num_rows(arrays: Mapping[str, Array]) -> int:
    """The size of the first dimension that all inputs share; 0 if they share none."""
    sizes = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    return sizes.pop() if len(sizes) == 1 else 0


def split_rows(arrays: Mapping[str, Array], limit: int) -> Iterator[Mapping[str, Array]]:
    """The same inputs in parts of at most `limit` rows and, but for single rows, MAX_PART_BYTES."""
    total = num_rows(arrays)
    row_bytes = sum(array.nbytes for array in arrays.values()) // max(1, total)
    size = min(limit, max(1, MAX_PART_BYTES // max(1, row_bytes)))
    if total <= size:
        yield arrays
        return
    for first in range(0, total, size):
        yield {name: array[first : first + size] for name, array in arrays.items()}


def joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The outputs of consecutive parts as one, the caller's to change."""
    if len(parts) == 1:
        return {name: array.copy() for name, array in parts[0].items()}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read(output: pb.ModelInferResponse.InferOutputTensor, raw: bytes | None) -> Array:
    datatype, shape = DATATYPES[output.datatype], tuple(output.shape)
    if raw is not None:
        return to_array(datatype, shape, raw)
    elements = getattr(output.contents, str(datatype.contents))
    return np.array(list(elements), datatype.dtype).reshape(shape)


def _datatype(name: str, array: Array) -> Datatype:
    if array.dtype not in _BY_DTYPE:
        raise invalid(f"input {name!r}: no tensor of the protocol holds {array.dtype}; convert it first")
    return _BY_DTYPE[array.dtype]
