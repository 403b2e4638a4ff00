"""Converts request bodies of HTTP's infer endpoint to the plain values of `serving.inference.request`.

The Open Inference Protocol has two forms: tensors as lists in the JSON, and Triton's binary tensor extension, where the
tensors' bytes follow the JSON in the order in which it names them
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).
"""

import json
from itertools import chain
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from serving.errors import InvalidArgument, quote
from serving.inference.request import InferInput, InferRequest, RequestedOutput
from serving.protocol.json_responses import OutputForm
from serving.protocol.parameters import requested_output, shared_range
from serving.protocol.tensors import (
    DATATYPES,
    MAX_RANK,
    Buffer,
    Datatype,
    Shape,
    from_elements,
    num_elements,
)

T = TypeVar("T")

MAX_JSON_BYTES = 4 << 20
MAX_JSON_LISTS = 100_000
"""Lists and objects. Parsing holds the GIL, and a list takes thirty times its size in JSON."""

MAX_TENSORS = 1024
"""Inputs, or outputs, of one request."""
MAX_PARAMETERS = 256
MAX_KEY_CHARS = 256
MAX_VALUE_CHARS = 64 << 10
"""Of a request, an input or an output."""

_CHUNK = 64 << 10
"""Elements that are converted at a time: each step holds the GIL, for a millisecond."""

_MAX_INT64 = (1 << 63) - 1

# msgspec checks these types strictly: 1.7 and 1.0 are no integers, true is no number, "1" is no number. A field that
# may be absent may be null.
_Parameters = Annotated[
    dict[
        Annotated[str, Meta(max_length=MAX_KEY_CHARS)],
        Annotated[str, Meta(max_length=MAX_VALUE_CHARS)]
        | bool
        | Annotated[int, Meta(ge=-_MAX_INT64 - 1, le=_MAX_INT64)]
        | float,
    ],
    Meta(max_length=MAX_PARAMETERS),
]
_Dimension = Annotated[int, Meta(ge=0, le=_MAX_INT64)]
_ELEMENTS: dict[str, Any] = {"b": list[bool], "i": list[int], "u": list[int], "f": list[float], "O": list[str]}
"""JSON elements by the kind of the tensor's numpy data type."""


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: Annotated[list[_Dimension], Meta(max_length=MAX_RANK)]
    data: list[Any] | None = None
    parameters: _Parameters | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: _Parameters | None = None


class _Request(msgspec.Struct):
    inputs: Annotated[list[_Input], Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[list[_Output], Meta(max_length=MAX_TENSORS)] | None = None
    id: str | None = None
    parameters: _Parameters | None = None


_REQUEST_DECODER = msgspec.json.Decoder(_Request)


def decode(body: Buffer, decoder: msgspec.json.Decoder[T]) -> T:
    """Returns the JSON value in a body.

    Raises:
        InvalidArgument: the body is not JSON, not of the decoder's type, or too long.
    """
    if len(body) > MAX_JSON_BYTES:
        raise InvalidArgument(
            f"JSON of {len(body)} bytes is too long: at most {MAX_JSON_BYTES} are accepted; send tensors as binary data"
        )
    body = bytes(body)
    if body.count(b"[") + body.count(b"{") > MAX_JSON_LISTS:
        raise InvalidArgument(f"JSON with more than {MAX_JSON_LISTS} lists and objects: send tensors as binary data")
    try:
        if not body.isascii():
            str(body, "utf-8")  # msgspec does not look at the text that it skips
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"the request does not fit the protocol: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(body, decoder.type)


def _decode_leniently(body: bytes, kind: type[T]) -> T:
    """Decodes what strict JSON forbids, and clients send and Triton accepts: NaN, Infinity, and a byte order mark."""
    try:
        return msgspec.convert(json.loads(str(body, "utf-8-sig")), kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"the request does not fit the protocol: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the request is not JSON: {error}") from error


def parse_request(
    body: Buffer, header_length: int | None, model_name: str, model_version: str
) -> tuple[InferRequest, OutputForm]:
    """Returns the inference in a body, and the form of its response.

    Args:
        header_length: number of bytes of JSON; None if the whole body is JSON.

    Raises:
        InvalidArgument: the body is malformed or contradicts itself.
    """
    if header_length is None:
        message, tail = decode(body, _REQUEST_DECODER), None
    elif header_length <= len(body):
        view = memoryview(body)
        message, tail = decode(view[:header_length], _REQUEST_DECODER), view[header_length:]
    else:
        raise InvalidArgument(f"the JSON is said to have {header_length} bytes, but the whole body has {len(body)}")
    parameters = message.parameters or {}
    binary = _flag(parameters.pop("binary_data_output", False), "parameter 'binary_data_output'")
    outputs, form = _parse_outputs(message.outputs or [], binary)
    inputs = _parse_inputs(message.inputs, tail)
    request = InferRequest(
        model_name=model_name,
        model_version=model_version,
        id=message.id or "",
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
        uses_shared_memory=any(given.shared for given in inputs) or any(output.shared for output in outputs),
    )
    return request, form


def _parse_outputs(outputs: list[_Output], binary: bool) -> tuple[list[RequestedOutput], OutputForm]:
    form = OutputForm(binary)
    for output in outputs:
        flag = (output.parameters or {}).get("binary_data")
        if flag is not None:
            form.by_name[output.name] = _flag(flag, f"binary_data of output {quote(output.name)}")
    return [requested_output(output.name, output.parameters or {}) for output in outputs], form


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be true or false, got {quote(value)}")
    return value


def _parse_inputs(inputs: list[_Input], tail: memoryview | None) -> list[InferInput]:
    """Returns the inputs.

    Args:
        tail: the bytes after the JSON, which must be exactly those of the binary inputs; None if there is no tail.
    """
    parsed = []
    start = 0
    for given in inputs:
        shared = shared_range(given.parameters) if given.parameters else None
        shape = tuple(given.shape)
        if num_elements(shape) > _MAX_INT64:
            raise InvalidArgument(f"shape of input {quote(given.name)} has more elements than 64 bits can count")
        size = _binary_size(given)
        if size is None:
            data: Buffer = b"" if shared is not None and given.data is None else _to_bytes(given, shape)
        elif tail is None:
            raise InvalidArgument(
                f"input {quote(given.name)} has a binary_data_size, but header "
                "Inference-Header-Content-Length does not say where the JSON ends"
            )
        else:
            data = tail[start : start + size]
            start += size
        parsed.append(InferInput(given.name, given.datatype, shape, data, shared))
    if tail is not None and start != len(tail):
        raise InvalidArgument(
            f"expected {start} bytes after the JSON, the sum of all binary_data_size, got {len(tail)}"
        )
    return parsed


def _binary_size(given: _Input) -> int | None:
    size = (given.parameters or {}).get("binary_data_size")
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise InvalidArgument(
            f"binary_data_size of input {quote(given.name)} must be a whole number from 0, got {quote(size)}"
        )
    if given.data is not None:
        raise InvalidArgument(f"input {quote(given.name)} has both data and a binary_data_size: expected one of them")
    return size


def _to_bytes(given: _Input, shape: Shape) -> bytes:
    """Returns the tensor in an input's `data`, a flat or nested list, as raw bytes."""
    datatype = DATATYPES.get(given.datatype)
    if datatype is None:
        raise InvalidArgument(f"input {quote(given.name)}: unknown data-type {quote(given.datatype)}")
    if datatype.name == "FP16":
        raise InvalidArgument(f"input {quote(given.name)}: FP16 is only accepted as binary data")
    if given.data is None:
        raise InvalidArgument(f"input {quote(given.name)} has neither data nor a binary_data_size")
    elements = _flatten(given.data, given.name)
    if len(elements) != num_elements(shape):
        raise InvalidArgument(
            f"input {quote(given.name)}: expected {num_elements(shape)} elements for shape {list(shape)}, "
            f"got {len(elements)}"
        )
    return _encode_elements(datatype, elements, given.name)


def _flatten(data: list[Any], name: str) -> list[Any]:
    """Returns the elements of nested lists of equal lengths, row-major."""
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list} or len(set(map(len, data))) > 1:
            raise InvalidArgument(f"data of input {quote(name)} is ragged: sibling lists must have the same length")
        data = list(chain.from_iterable(data))
    return data


def _encode_elements(datatype: Datatype, elements: list[Any], name: str) -> bytes:
    kind = _ELEMENTS[datatype.dtype.kind]
    parts = []
    try:
        for start in range(0, len(elements), _CHUNK):
            parts.append(from_elements(datatype, msgspec.convert(elements[start : start + _CHUNK], kind)))
    except (msgspec.ValidationError, InvalidArgument, UnicodeEncodeError) as error:
        where = f", counted from element {start}" if start else ""
        raise InvalidArgument(f"data of input {quote(name)} must be of {datatype.name}: {error}{where}") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)
