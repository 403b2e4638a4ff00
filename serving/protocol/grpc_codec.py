"""Reads ModelInfer's protobuf messages into plain values, and writes its responses.

Responses are written field by field, without protobuf objects: the output tensors are copied once, and the bytes that
all responses of a plan share are kept (https://protobuf.dev/programming-guides/encoding/).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from protos.grpc_service_pb2 import (
    InferParameter,
    ModelInferRequest,
    ModelInferResponse,
    ModelRepositoryParameter,
    ModelStreamInferResponse,
)
from serving.errors import InvalidArgument, ServingError, quote
from serving.inference.outputs import Outputs
from serving.inference.plan import Plan, SharedMemoryEncoder
from serving.inference.request import InferInput, InferRequest
from serving.protocol.parameters import requested_output, shared_range
from serving.protocol.tensors import DATATYPES, MAX_RANK, Buffer, Elements, Shape, num_elements
from serving.protocol.wire_format import SplitRequest, check_budget

M = TypeVar("M", bound=Message)

# The first byte of a length-delimited field: its number, shifted by 3, and wire type 2.
_ID = b"\x1a"  # ModelInferResponse.id, field 3
_RAW_OUTPUT = b"\x32"  # ModelInferResponse.raw_output_contents, field 6
_INFER_RESPONSE = b"\x12"  # ModelStreamInferResponse.infer_response, field 2

_FINAL = ModelInferResponse(parameters={"triton_final_response": InferParameter(bool_param=True)}).SerializeToString()
"""Tells clients of streams that a request gets no further response: they are written for models that give several."""


# ---- Reading ---------------------------------------------------------------------------------------------------------


def decode(kind: type[M], payload: bytes) -> M:
    """Returns the message in these bytes.

    Raises:
        InvalidArgument: the bytes are not a message of this kind.
    """
    try:
        message: M = kind.FromString(payload)
    except DecodeError as error:
        raise InvalidArgument(f"the {len(payload)} bytes received are not a {kind.__name__}: {error}") from error
    return message


def parse_request(split: SplitRequest) -> InferRequest:
    """Returns the values in a message.

    Raises:
        InvalidArgument: the bytes are not a message, contradict each other, or have too many fields.
    """
    check_budget(split.header)
    message = decode(ModelInferRequest, split.header)
    inputs = _parse_inputs(message.inputs, split.tensors)
    outputs = [requested_output(output.name, parameter_values(output.parameters)) for output in message.outputs]
    return InferRequest(
        model_name=message.model_name,
        model_version=message.model_version,
        id=split.request_id,
        inputs=inputs,
        outputs=outputs,
        parameters=parameter_values(message.parameters),
        uses_shared_memory=any(given.shared for given in inputs) or any(output.shared for output in outputs),
    )


def _parse_inputs(tensors: Sequence[ModelInferRequest.InferInputTensor], raw: Sequence[memoryview]) -> list[InferInput]:
    """Returns the inputs.

    Args:
        raw: their data, or those of the ones that are not in shared memory; empty if they have contents of their own.
    """
    typed = [tensor.name for tensor in tensors if tensor.HasField("contents")]
    if raw and typed:
        raise InvalidArgument(
            f"contents of input {quote(typed[0])} and raw_input_contents are both given: "
            "expected one form for all inputs"
        )
    shared = [shared_range(parameter_values(tensor.parameters)) for tensor in tensors]
    num_raw = shared.count(None)
    if raw and len(raw) not in (num_raw, len(shared)):
        raise InvalidArgument(
            f"expected one entry of raw_input_contents for each of the {num_raw} inputs, got {len(raw)}"
        )
    entries = iter(raw)
    inputs = []
    for tensor, where in zip(tensors, shared, strict=True):
        if len(tensor.shape) > MAX_RANK:
            raise InvalidArgument(
                f"input {quote(tensor.name)} has {len(tensor.shape)} dimensions: at most {MAX_RANK} are accepted"
            )
        if raw and (where is None or len(raw) == len(shared)):
            data: Buffer | Elements = next(entries)
        else:
            data = b"" if where is not None and not tensor.HasField("contents") else _elements(tensor)
        inputs.append(InferInput(tensor.name, tensor.datatype, tuple(tensor.shape), data, where))
    return inputs


def parameter_values(parameters: Mapping[str, InferParameter | ModelRepositoryParameter]) -> dict[str, Any]:
    """Returns the plain values of a map of parameters, without those that hold nothing."""
    values = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            values[name] = getattr(parameter, kind)
    return values


def _elements(tensor: ModelInferRequest.InferInputTensor) -> Elements:
    """Returns a tensor's typed contents, not converted: the request has not been checked against a model yet."""
    datatype = DATATYPES.get(tensor.datatype)
    if datatype is None:
        raise InvalidArgument(f"input {quote(tensor.name)}: unknown data-type {quote(tensor.datatype)}")
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if datatype.contents is None:
        raise InvalidArgument(f"input {quote(tensor.name)}: {datatype.name} is only accepted in raw_input_contents")
    if filled not in ([], [datatype.contents]):
        raise InvalidArgument(
            f"input {quote(tensor.name)}: expected {datatype.name} in {datatype.contents}, got {', '.join(filled)}"
        )
    return Elements(datatype, getattr(tensor.contents, datatype.contents))


# ---- Writing ---------------------------------------------------------------------------------------------------------


class ResponseEncoder:
    """Writes the serialised ModelInferResponses of one plan."""

    __slots__ = ("_cached", "plan")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # The row shapes, and the head and fields for them, as one value: threads of all instances read and replace it.
        self._cached: tuple[list[Shape], bytes, list[tuple[int, int, bytes]]] = ([], b"", [])

    def bind(self, request: SplitRequest) -> tuple[Buffer, ...]:
        """Returns the inputs' bytes in the model's order. As `Plan.bind_inputs`."""
        return self.plan.bind_inputs(request.tensors)

    def encode(self, outputs: Outputs, first_row: int, request_id: str) -> bytes:
        """Returns the response for the plan's rows of a batch."""
        if outputs.is_large:
            outputs.check_size([index for index, top_k in self.plan.requested if not top_k], self.plan.rows)
        shapes, head, fields = self._cached
        if outputs.row_shapes != shapes:
            head, fields = self._head(outputs), self._fields(outputs)
            self._cached = outputs.row_shapes, head, fields
        parts = [head, encode_id(request_id)] if request_id else [head]
        for index, top_k, field in fields:
            if field:
                parts += (field, outputs.data(index, first_row, self.plan.rows))
            else:
                data = self.plan.output_data(outputs, index, top_k, first_row)
                parts += (_RAW_OUTPUT, varint(len(data)), data)
        return b"".join(parts)

    def _head(self, outputs: Outputs) -> bytes:
        """Returns the part of a response that names the model and the outputs' names, types and shapes."""
        spec = self.plan.model.spec
        head = ModelInferResponse(model_name=spec.name, model_version=self.plan.model.version)
        for index, top_k in self.plan.requested:
            datatype, shape = self.plan.output_type(outputs, index, top_k)
            head.outputs.add(name=spec.outputs[index].name, datatype=datatype, shape=shape)
        encoded: bytes = head.SerializeToString()
        return encoded

    def _fields(self, outputs: Outputs) -> list[tuple[int, int, bytes]]:
        """Returns each requested output's index, number of classes, and field tag with length (empty if it varies)."""
        fields = []
        for index, top_k in self.plan.requested:
            array = outputs.arrays[index]
            is_fixed = not top_k and array.dtype != object
            size = num_elements(outputs.row_shapes[index]) * self.plan.rows * array.itemsize
            fields.append((index, top_k, _RAW_OUTPUT + varint(size) if is_fixed else b""))
        return fields


class SharedMemoryResponseEncoder:
    """Makes the serialised ModelInferResponses of a plan with outputs in shared memory."""

    __slots__ = ("_values", "plan")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._values = SharedMemoryEncoder(plan)

    def bind(self, request: SplitRequest) -> tuple[Buffer, ...]:
        """Returns the inputs' bytes in the model's order. As `Plan.bind_inputs`."""
        return self.plan.bind_inputs(request.tensors)

    def encode(self, outputs: Outputs, first_row: int, request_id: str) -> bytes:
        """Writes the outputs, and returns the response for the plan's rows of a batch."""
        values = self._values.encode(outputs, first_row, request_id)
        message = ModelInferResponse(model_name=values.model_name, model_version=values.model_version, id=values.id)
        for output in values.outputs:
            message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            message.raw_output_contents.append(bytes(output.data))  # an empty one, for clients that count them
        encoded: bytes = message.SerializeToString()
        return encoded


def make_response_encoder(plan: Plan, request: SplitRequest) -> ResponseEncoder | SharedMemoryResponseEncoder:
    """Returns what makes the responses of a plan."""
    return ResponseEncoder(plan) if plan.places is None else SharedMemoryResponseEncoder(plan)


def encode_id(request_id: str) -> bytes:
    """Returns a request's id as that field of a ModelInferResponse; nothing for no id."""
    encoded = request_id.encode()
    return _ID + varint(len(encoded)) + encoded if encoded else b""


def encode_stream_response(response: bytes) -> bytes:
    """Returns a serialised ModelInferResponse as a message of ModelStreamInfer."""
    return b"".join((_INFER_RESPONSE, varint(len(response) + len(_FINAL)), response, _FINAL))


def encode_stream_error(error: ServingError, request_id: str) -> bytes:
    """Returns an error as a message of ModelStreamInfer, which does not end the stream."""
    message: bytes = ModelStreamInferResponse(error_message=str(error)).SerializeToString()
    return message + encode_stream_response(encode_id(request_id))


def varint(number: int) -> bytes:
    """Returns a non-negative integer in protobuf's base-128 form."""
    if number < 128:
        return _ONE_BYTE[number]
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


_ONE_BYTE = [bytes([number]) for number in range(128)]
