"""Inference over HTTP: requests that are recognised by their JSON, and the responses of one plan.

A client that sends tensors as bytes after the JSON sends the same JSON with each of them, as long as names, shapes and
data types are the same. Such a request is found in the plan cache by its JSON, and not parsed.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from serving.inference.outputs import Outputs
from serving.inference.plan import Plan, SharedMemoryEncoder, ValueEncoder
from serving.inference.request import InferRequest, InferResponse
from serving.protocol.json_codec import parse_request
from serving.protocol.json_responses import (
    OutputForm,
    encode_id,
    encode_json,
    encode_model,
    render_response,
    response_too_large,
)
from serving.protocol.tensors import Buffer, Elements, Shape, num_elements
from serving.protocol.wire_format import MAX_KEY_BYTES

MAX_INLINE_OUTPUT_BYTES = 8 << 10
"""Of tensors that are rendered as JSON in one piece, in about a millisecond."""


class JsonRequest:
    """The body of an inference, and the model in its path; an `EncodedRequest`.

    Args:
        header_length: bytes of JSON before the tensors; None if the whole body is JSON.

    Attributes:
        tail: the bytes after the JSON; None if the whole body is JSON.
    """

    __slots__ = ("_body", "_header_length", "_model", "_parsed", "_version", "key", "tail")

    def __init__(self, body: Buffer, header_length: int | None, model_name: str, model_version: str) -> None:
        self._body = body
        self._header_length = header_length
        self._model, self._version = model_name, model_version
        self._parsed: tuple[InferRequest, OutputForm] | None = None
        self.tail = None if header_length is None else memoryview(body)[header_length:]
        self.key: Hashable | None = self._recognise()

    def _recognise(self) -> Hashable | None:
        """Returns the key of a request that consists of a little JSON and of tensors; None for any other."""
        length = self._header_length
        if length is None or length > MAX_KEY_BYTES or not self.tail or len(self._version) > MAX_KEY_BYTES:
            return None
        header = bytes(self._body[:length])
        # Each id would have a plan of its own. An escape may hide one.
        return None if b'"id"' in header or b"\\" in header else (self._model, self._version, header)

    def parse(self) -> InferRequest:
        """Returns the values in the body.

        Raises:
            InvalidArgument: the body is malformed or contradicts itself.
        """
        if self._parsed is None:
            self._parsed = parse_request(self._body, self._header_length, self._model, self._version)
            if self.key is None and (key := self._parsed[0].key) is not None:
                self.key = (key, self._parsed[1].key)
        return self._parsed[0]

    @property
    def form(self) -> OutputForm:
        """The outputs that the client requests as bytes."""
        self.parse()
        assert self._parsed is not None
        return self._parsed[1]

    @property
    def request_id(self) -> str:
        """The client's id; empty for none. A request that is recognised by its JSON has none."""
        return "" if self._parsed is None else self._parsed[0].id

    @property
    def tensors(self) -> Sequence[Buffer | Elements]:
        """The data of the inputs."""
        return self.parse().tensors


class JsonResponse(Protocol):
    """A response that can be rendered."""

    @property
    def size_in_json(self) -> int:
        """The bytes of those tensors that go into the JSON."""

    def render(self, max_bytes: int) -> tuple[bytes, int | None]:
        """Returns the body, and the number of bytes of JSON in it (None if all of it is JSON).

        Raises:
            InvalidArgument: JSON cannot hold an output, or the body would be larger than `max_bytes`.
        """


class _Values(NamedTuple):
    """A response of any kind."""

    response: InferResponse
    form: OutputForm

    @property
    def size_in_json(self) -> int:
        return self.form.size_in_json(self.response)

    def render(self, max_bytes: int) -> tuple[bytes, int | None]:
        return render_response(self.response, self.form, max_bytes)


class _Rows(NamedTuple):
    """A small response of numbers, still in the outputs of its batch."""

    encoder: "JsonEncoder"
    outputs: Outputs
    first_row: int
    request_id: str

    @property
    def size_in_json(self) -> int:
        return 0  # little enough to be rendered anywhere

    def render(self, max_bytes: int) -> tuple[bytes, int | None]:
        return self.encoder.render(self, max_bytes)


class _Part(NamedTuple):
    """An output in a response.

    Args:
        output: its index.
        text: of the JSON, up to the output's data.
    """

    output: int
    is_binary: bool
    text: bytes


class JsonEncoder:
    """Makes the responses of one plan. Keeps what they have in common."""

    __slots__ = ("_cached", "_form", "_may_cache", "_model", "_values", "plan")

    def __init__(self, plan: Plan, request: JsonRequest) -> None:
        self.plan = plan
        self._form = form = request.form
        self._values = ValueEncoder(plan) if plan.places is None else SharedMemoryEncoder(plan)
        self._model = encode_model(plan.model.spec.name, plan.model.version)
        specs = [(plan.model.spec.outputs[index], top_k) for index, top_k in plan.requested]
        self._may_cache = plan.places is None and all(
            not top_k and spec.datatype.size and (spec.datatype.name != "FP16" or form.is_binary(spec.name))
            for spec, top_k in specs
        )
        # The row shapes, the parts for them, and whether they are small: one value, which several threads replace.
        self._cached: tuple[list[Shape], list[_Part], bool] = ([], [], False)

    def bind(self, request: JsonRequest) -> tuple[Buffer, ...]:
        """Returns the inputs' bytes in the model's order.

        Raises:
            InvalidArgument: they do not fit the plan.
        """
        tail = request.tail
        if tail is not None and len(tail) == self.plan.only_size:
            return (tail,)  # the JSON describes this one tensor
        return self.plan.bind_inputs(request.tensors)

    def encode(self, outputs: Outputs, first_row: int, request_id: str) -> JsonResponse:
        """Returns the response for the plan's rows of a batch, not rendered: the front end does that."""
        if self._may_cache and not outputs.is_large:
            if outputs.row_shapes != self._cached[0]:
                self._cached = self._make_parts(outputs)
            if self._cached[2]:
                return _Rows(self, outputs, first_row, request_id)
        return _Values(self._values.encode(outputs, first_row, request_id), self._form)

    def render(self, response: _Rows, max_bytes: int) -> tuple[bytes, int | None]:
        """Renders the rows of a batch. As `JsonResponse.render`."""
        outputs, first_row, rows = response.outputs, response.first_row, self.plan.rows
        pieces = [self._model]
        if response.request_id:
            pieces.append(encode_id(response.request_id))
        tail: list[bytes] = []
        for index, is_binary, text in self._parts(outputs):
            pieces.append(text)
            if is_binary:
                tail.append(outputs.data(index, first_row, rows))
            else:
                elements: list[Any] = outputs.slice(index, first_row, rows).ravel().tolist()
                pieces.append(encode_json(elements)[1:-1])
                pieces.append(b"]}")
        pieces.append(b"]}")
        header = b"".join(pieces)
        body = b"".join([header, *tail]) if tail else header
        if len(body) > max_bytes:
            raise response_too_large(max_bytes)
        return body, len(header) if tail else None

    def _parts(self, outputs: Outputs) -> list[_Part]:
        shapes, parts, _ = self._cached
        return parts if shapes == outputs.row_shapes else self._make_parts(outputs)[1]

    def _make_parts(self, outputs: Outputs) -> tuple[list[Shape], list[_Part], bool]:
        """Returns what the responses of these row shapes have in common."""
        spec = self.plan.model.spec
        before = b',"outputs":['
        parts = []
        size_in_json = 0
        for index, _ in self.plan.requested:
            name = spec.outputs[index].name
            datatype, shape = self.plan.output_type(outputs, index, 0)
            described: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
            size = num_elements(shape) * outputs.arrays[index].itemsize
            is_binary = self._form.is_binary(name)
            if is_binary:
                text = encode_json(described | {"parameters": {"binary_data_size": size}})
            else:
                text = encode_json(described)[:-1] + b',"data":['
                size_in_json += size
            parts.append(_Part(index, is_binary, before + text))
            before = b","
        return outputs.row_shapes, parts, size_in_json <= MAX_INLINE_OUTPUT_BYTES
