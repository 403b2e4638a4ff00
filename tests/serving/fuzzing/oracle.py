"""Says which responses to an inference request are right. Written from the protocol, not from the server's code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from protos import grpc_service_pb2 as pb
from serving.protocol.tensors import DATATYPES, Array
from tests.serving.fuzzing.requests import MODELS, VARIABLE, Model, Tensor
from tests.serving.fuzzing.wire import GROUP

OK, INVALID, DEADLINE, NOT_FOUND, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 3, 4, 5, 8, 12, 13, 14

MANY = 64
"""Inputs, outputs or parameters: the server may refuse more than these for their number alone."""
TRITON_PARAMETERS = ("triton_enable_empty_final_response", "triton_grpc_error")
"""Reserved keys that Triton's clients send."""
MAX_RANK = 32
MAX_SIZE = 1 << 24
"""Of a dimension or a whole tensor: no message here is as long."""
SHORT_TIMEOUT_US = 30_000_000


@dataclass(slots=True)
class Given:
    """An input as the client sent it.

    Args:
        data: raw bytes, or None if it has single elements.
        elements: by the name of their field, as in InferTensorContents.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | None
    elements: dict[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Asked:
    """An inference request as the client sent it, valid or not.

    Args:
        outputs: names, and the value of their parameter `classification`.
        wrong: status codes of what was wrong with the form.
        doubtful: status codes that are right, but not the only ones.
    """

    model: str
    version: str
    id: str
    inputs: list[Given]
    outputs: list[tuple[str, Any]]
    parameters: dict[str, Any]
    wrong: set[int] = field(default_factory=set)
    doubtful: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Output:
    """An output that the server must return.

    Args:
        array: its value; with `classes`, the numbers that are classified.
        tolerance: the error that its numbers may have; 0 for the same bytes.
        classes: the number of classes; 0 for the tensor itself.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: Array
    tolerance: Array | float
    classes: int = 0
    labels: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Expected:
    """The responses that are right.

    Args:
        codes: gRPC status codes.
        outputs: of the response, if its code is OK.
    """

    codes: frozenset[int]
    model: str = ""
    version: str = ""
    id: str = ""
    outputs: tuple[Output, ...] = ()


def expect_infer(payload: bytes) -> Expected:
    """Returns the right responses to a serialised ModelInferRequest."""
    try:
        message = pb.ModelInferRequest.FromString(payload)
    except Exception:  # DecodeError, which is all that protobuf promises
        return Expected(frozenset({INVALID, EXHAUSTED} if len(payload) > 10_000 else {INVALID}))
    asked = _asked(message)
    if len(payload) > 10_000 or has_groups(message):
        asked.doubtful |= {INVALID, EXHAUSTED}
    return judge(asked)


def has_groups(message: Message) -> bool:
    """Returns whether there is an unknown group anywhere. proto3 has no groups, and a server may refuse them."""
    without = type(message)()
    without.CopyFrom(message)
    without.DiscardUnknownFields()
    return without.ByteSize() != message.ByteSize() and _has_group(message)


def _has_group(message: Message) -> bool:
    if any(unknown.wire_type == GROUP for unknown in UnknownFieldSet(message)):
        return True
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        if descriptor.message_type.GetOptions().map_entry:
            inner = value.values()
        else:
            inner = value if descriptor.is_repeated else [value]
        if any(map(_has_group, inner)):
            return True
    return False


def judge(asked: Asked) -> Expected:
    """Returns the right responses to a request."""
    wrong = asked.wrong | _form_errors(asked)
    doubtful = asked.doubtful | _doubts(asked)
    model = MODELS.get(asked.model)
    if model is None:
        return Expected(frozenset(wrong | doubtful | {NOT_FOUND}))
    version, errors = _version(model, asked.version)
    wrong |= errors | _input_errors(model, asked.inputs) | _output_errors(model, asked.outputs)
    if wrong:
        return Expected(frozenset(wrong | doubtful))
    outputs = tuple(_outputs(model, version, asked))
    return Expected(frozenset({OK} | doubtful), asked.model, version, asked.id, outputs)


def _asked(message: pb.ModelInferRequest) -> Asked:
    raw = list(message.raw_input_contents)
    typed = [tensor for tensor in message.inputs if tensor.HasField("contents")]
    wrong = {INVALID} if raw and (typed or len(raw) != len(message.inputs)) else set()
    inputs = []
    for place, tensor in enumerate(message.inputs):
        elements = {descriptor.name: values for descriptor, values in tensor.contents.ListFields()}
        data = raw[place] if place < len(raw) else None
        inputs.append(Given(tensor.name, tensor.datatype, tuple(tensor.shape), data, elements))
        if "shared_memory_region" in parameter_values(tensor.parameters):
            wrong.add(UNIMPLEMENTED)
    outputs = []
    for output in message.outputs:
        parameters = parameter_values(output.parameters)
        outputs.append((output.name, parameters.get("classification", 0)))
        if "shared_memory_region" in parameters:
            wrong.add(UNIMPLEMENTED)
    asked = Asked(message.model_name, message.model_version, message.id, inputs, outputs, {}, wrong)
    asked.parameters = parameter_values(message.parameters)
    if any(len(tensor.parameters) > MANY for tensor in (*message.inputs, *message.outputs)):
        asked.doubtful |= {INVALID, EXHAUSTED}
    return asked


def parameter_values(parameters: Any) -> dict[str, Any]:
    """Returns a map of parameters as values; those without a value do not count."""
    kinds = {key: parameter.WhichOneof("parameter_choice") for key, parameter in parameters.items()}
    return {key: getattr(parameters[key], kind) for key, kind in kinds.items() if kind is not None}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_reserved(key: str) -> bool:
    return key == "headers" or (key.startswith("triton_") and key not in TRITON_PARAMETERS)


def _form_errors(asked: Asked) -> set[int]:
    """Returns the codes of errors that do not depend on the model."""
    is_wrong = not _is_whole(asked.parameters.get("timeout", 0))
    is_wrong |= not all(_is_whole(classes) for _, classes in asked.outputs)
    is_wrong |= any(_is_reserved(key) for key in asked.parameters)
    for given in asked.inputs:
        if given.data is None:
            kind = DATATYPES.get(given.datatype)
            is_wrong |= kind is None or kind.contents is None or not given.elements.keys() <= {kind.contents}
    codes = {UNIMPLEMENTED} if asked.parameters.get("sequence_id") else set()
    return codes | {INVALID} if is_wrong else codes


def _doubts(asked: Asked) -> set[int]:
    codes = set()
    timeout = asked.parameters.get("timeout", 0)
    if _is_whole(timeout) and 0 < timeout < SHORT_TIMEOUT_US:
        codes.add(DEADLINE)
    if any(len(given.shape) > MAX_RANK for given in asked.inputs):
        codes.add(INVALID)
    if max(len(asked.inputs), len(asked.outputs), len(asked.parameters)) > MANY:
        codes |= {INVALID, EXHAUSTED}
    return codes


def version_errors(name: str, version: str) -> set[int]:
    """Returns the codes of the errors in the name and version of a model."""
    model = MODELS.get(name)
    if model is None:
        return {NOT_FOUND, INVALID} if version else {NOT_FOUND}
    return _version(model, version)[1]


def _version(model: Model, text: str) -> tuple[str, set[int]]:
    if not text:
        return model.versions[-1], set()
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        return "", {INVALID}
    number = str(int(text))
    return number, set() if number in model.versions else {NOT_FOUND}


def _input_errors(model: Model, inputs: Sequence[Given]) -> set[int]:
    by_name = {given.name: given for given in inputs}
    expected = {tensor.name: tensor for tensor in model.inputs}
    if by_name.keys() != expected.keys() or len(inputs) != len(expected):
        return {INVALID}
    if not all(_fits(model, expected[given.name], given) for given in inputs):
        return {INVALID}
    rows = {given.shape[0] for given in inputs} if model.max_rows else {1}
    return set() if len(rows) == 1 and 1 <= min(rows) <= max(1, model.max_rows) else {INVALID}


def _fits(model: Model, tensor: Tensor, given: Given) -> bool:
    dims = (VARIABLE, *tensor.dims) if model.max_rows else tensor.dims
    if given.datatype != tensor.datatype or len(given.shape) != len(dims) or min(given.shape, default=0) < 0:
        return False
    if any(want not in (VARIABLE, have) for want, have in zip(dims, given.shape, strict=True)):
        return False
    return read(given) is not None


def read(given: Given) -> Array | None:
    """Returns an input's array; None if its data do not fit its data type and shape."""
    kind = DATATYPES[given.datatype]
    count = math.prod(given.shape)
    if max(given.shape, default=0) > MAX_SIZE or count > MAX_SIZE:
        return None
    if given.data is None:
        values = list(given.elements.get(kind.contents or "", ()))
    elif kind.size:
        return (
            np.frombuffer(given.data, kind.dtype).reshape(given.shape) if len(given.data) == count * kind.size else None
        )
    else:
        values = split_strings(given.data)
    if values is None or len(values) != count:
        return None
    if kind.dtype.kind in "iu" and values:
        limits = np.iinfo(kind.dtype)
        if min(values) < limits.min or max(values) > limits.max:
            return None
    array = np.empty(count, kind.dtype)
    array[:] = values
    return array.reshape(given.shape)


def split_strings(data: bytes) -> list[bytes] | None:
    """Returns the elements of a BYTES tensor; None if it is cut off."""
    elements = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data) or at + 4 > len(data):
            return None
        elements.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return elements


def _output_errors(model: Model, outputs: Sequence[tuple[str, Any]]) -> set[int]:
    datatypes = {tensor.name: tensor.datatype for tensor in model.outputs}
    if len({name for name, _ in outputs}) < len(outputs):
        return {INVALID}
    for name, classes in outputs:
        if name not in datatypes or (classes and datatypes[name] == "BYTES"):
            return {INVALID}
    return set()


def _outputs(model: Model, version: str, asked: Asked) -> list[Output]:
    arrays = {given.name: read(given) for given in asked.inputs}
    with np.errstate(all="ignore"):
        values = model.compute(*(arrays[tensor.name] for tensor in model.inputs))
        if asked.model == "versions":
            values = [(value + np.float32(version), tolerance) for value, tolerance in values]
    places = {tensor.name: place for place, tensor in enumerate(model.outputs)}
    outputs = []
    for name, classes in asked.outputs or [(tensor.name, 0) for tensor in model.outputs]:
        array, tolerance = values[places[name]]
        datatype, shape = model.outputs[places[name]].datatype, array.shape
        if classes:
            rows = shape[0] if model.max_rows else 1
            classes = min(classes, array.size // rows)
            datatype, shape = "BYTES", (rows, classes) if model.max_rows else (classes,)
        outputs.append(Output(name, datatype, shape, array, tolerance, classes, model.labels))
    return outputs
