"""Renders responses of HTTP's infer endpoint: the plain values of `serving.inference.request` as JSON and bytes.

Both forms of the Open Inference Protocol are described in `serving.protocol.json_codec`.
"""

import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serving.errors import InvalidArgument
from serving.inference.request import InferOutput, InferResponse
from serving.protocol.tensors import DATATYPES, Array, Buffer, to_array

_CHUNK = 8192
"""Elements that are rendered at a time: rendering holds the GIL, for some milliseconds each."""
_MIN_ELEMENT_BYTES = 2
"""Of JSON: a digit and a comma."""


encode_json = msgspec.json.Encoder().encode
"""Writes null for NaN and infinity, as JavaScript and most encoders do. Five times as fast as `json`."""


@dataclass(slots=True)
class OutputForm:
    """The outputs that the client requests as bytes after the JSON; the others go into the JSON.

    Args:
        binary: for outputs that `by_name` does not contain.
    """

    binary: bool = False
    by_name: dict[str, bool] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """Everything in it, for a key of the plan cache."""
        return self.binary, tuple(self.by_name.items())

    def is_binary(self, name: str) -> bool:
        """Returns whether an output goes after the JSON."""
        return self.by_name.get(name, self.binary)

    def size_in_json(self, response: InferResponse) -> int:
        """Returns the bytes of those tensors that go into the JSON."""
        return sum(len(output.data) for output in response.outputs if not self.is_binary(output.name))


def render_response(response: InferResponse, form: OutputForm, max_bytes: int) -> tuple[bytes, int | None]:
    """Returns the body of a response, and the number of bytes of JSON in it (None if all of it is JSON).

    Args:
        max_bytes: of the body.

    Raises:
        InvalidArgument: JSON cannot hold an output, or the body would be too large.
    """
    room = max_bytes - sum(len(output.data) for output in response.outputs if form.is_binary(output.name))
    outputs: list[bytes] = []
    tail: list[Buffer] = []
    for output in response.outputs:
        described: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if output.is_shared:
            outputs.append(encode_json(described))
        elif form.is_binary(output.name):
            outputs.append(encode_json(described | {"parameters": {"binary_data_size": len(output.data)}}))
            tail.append(output.data)
        else:
            data = _render_data(output, room, max_bytes)
            room -= len(data)
            outputs.append(b'%b,"data":[%b]}' % (encode_json(described)[:-1], data))
        if room < 0:
            raise response_too_large(max_bytes)
    model = encode_model(response.model_name, response.model_version)
    header = b'%b%b,"outputs":[%b]}' % (model, encode_id(response.id) if response.id else b"", b",".join(outputs))
    return (b"".join([header, *tail]), len(header)) if tail else (header, None)


def encode_model(name: str, version: str) -> bytes:
    """Returns the beginning of a response."""
    return encode_json({"model_name": name, "model_version": version})[:-1]


def encode_id(request_id: str) -> bytes:
    """Returns a request's id as the next field of a response."""
    # It may hold what UTF-8 cannot, such as half of a surrogate pair, which `json` escapes.
    return b',"id":%b' % json.dumps(request_id).encode()


def response_too_large(max_bytes: int) -> InvalidArgument:
    """Returns the error for a body of more than `max_bytes`."""
    return InvalidArgument(
        f"the response is larger than {max_bytes} bytes: request binary data, or fewer rows or outputs"
    )


def _render_data(output: InferOutput, room: int, max_bytes: int) -> bytes:
    """Returns the elements of a tensor as JSON, without the brackets of the list.

    Args:
        room: bytes that are left of `max_bytes`.

    Raises:
        InvalidArgument: JSON cannot hold the tensor, or takes more than `room`.
    """
    if output.datatype == "FP16":
        raise InvalidArgument(f"output '{output.name}' is FP16, which JSON cannot hold: request binary data")
    flat = to_array(DATATYPES[output.datatype], output.shape, output.data).ravel()
    if _MIN_ELEMENT_BYTES * len(flat) > room:
        raise response_too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    for start in range(0, len(flat), _CHUNK):
        chunks.append(encode_json(_elements(flat[start : start + _CHUNK], output.name))[1:-1])
        size += len(chunks[-1])
        if size > room:
            raise response_too_large(max_bytes)
    return b",".join(chunks)


def _elements(flat: Array, name: str) -> list[Any]:
    elements: list[Any] = flat.tolist()
    if flat.dtype != object:
        return elements
    try:
        return [str(element, "utf-8") for element in elements]
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"output '{name}' holds bytes that are not UTF-8, which JSON cannot hold: request binary data"
        ) from error
