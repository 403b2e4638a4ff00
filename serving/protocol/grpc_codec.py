"""ModelInfer's messages and the plain values of `serving.inference.request`, both ways. Knows no model."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from protos.grpc_service_pb2 import InferParameter, ModelInferRequest
from serving.errors import InvalidArgument, Unsupported, quote
from serving.inference.request import InferInput, InferRequest, RequestedOutput
from serving.protocol.tensors import DATATYPES, Elements


def parse_request(message: ModelInferRequest) -> InferRequest:
    """The values in a message.

    Raises:
        InvalidArgument: it contradicts itself.
        Unsupported: it refers to shared memory.
    """
    raw = message.raw_input_contents
    typed = [tensor.name for tensor in message.inputs if tensor.HasField("contents")]
    if raw and typed:
        raise InvalidArgument(
            f"contents of input {quote(typed[0])} and raw_input_contents are both given: "
            "expected one form for all inputs"
        )
    inputs = [
        InferInput(tensor.name, tensor.datatype, tuple(tensor.shape), b"" if raw else _elements(tensor))
        for tensor in message.inputs
    ]
    for tensor in message.inputs:
        if "shared_memory_region" in tensor.parameters:
            raise Unsupported(f"input {quote(tensor.name)} is in shared memory, which this server does not read")
    if raw:
        if len(raw) != len(inputs):
            raise InvalidArgument(
                f"expected one entry of raw_input_contents for each of the {len(inputs)} inputs, got {len(raw)}"
            )
        for given, data in zip(inputs, raw, strict=True):
            given.data = data
    return InferRequest(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        inputs=inputs,
        outputs=[_requested(output) for output in message.outputs],
        parameters=parameters_of(message.parameters),
    )


def decode_request(payload: bytes) -> ModelInferRequest:
    """The message in those bytes.

    Raises:
        InvalidArgument: they are no such message.
    """
    try:
        message: ModelInferRequest = ModelInferRequest.FromString(payload)
    except DecodeError as error:
        raise InvalidArgument(f"the {len(payload)} bytes received are no ModelInferRequest: {error}") from error
    return message


def parameters_of(parameters: Mapping[str, InferParameter]) -> dict[str, Any]:
    """Plain values of a map of parameters; one that holds nothing is left out."""
    values = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            values[name] = getattr(parameter, kind)
    return values


def requested_output(name: str, parameters: Mapping[str, Any]) -> RequestedOutput:
    """What a caller wants of an output, from its parameters.

    Raises:
        InvalidArgument: `classification` is no positive whole number.
        Unsupported: the output is wanted in shared memory.
    """
    if "shared_memory_region" in parameters:
        raise Unsupported(f"output {quote(name)} is wanted in shared memory, which this server does not write")
    count = parameters.get("classification", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InvalidArgument(
            f"classification of output {quote(name)} must be a positive whole number, got {quote(count)}"
        )
    return RequestedOutput(name, count)


def _requested(output: ModelInferRequest.InferRequestedOutputTensor) -> RequestedOutput:
    return requested_output(output.name, parameters_of(output.parameters))


def _elements(tensor: ModelInferRequest.InferInputTensor) -> Elements:
    """The elements of a tensor as they are: whether a model wants them is not known yet."""
    datatype = DATATYPES.get(tensor.datatype)
    if datatype is None:
        raise InvalidArgument(f"input {quote(tensor.name)}: there is no data-type {quote(tensor.datatype)}")
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if datatype.contents is None:
        raise InvalidArgument(f"input {quote(tensor.name)}: {datatype.name} is only accepted in raw_input_contents")
    if filled not in ([], [datatype.contents]):
        raise InvalidArgument(
            f"input {quote(tensor.name)}: expected {datatype.name} in {datatype.contents}, got {', '.join(filled)}"
        )
    return Elements(datatype, getattr(tensor.contents, datatype.contents))
