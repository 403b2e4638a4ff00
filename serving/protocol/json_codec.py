"""Converts bodies of the infer endpoint to and from the plain values of `serving.inference.request`.

Two forms (Open Inference Protocol, REST): tensors as lists in the JSON, and Triton's binary tensor extension, where the
tensors' bytes follow the JSON in the order in which it names them
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.errors import InvalidArgument, Unsupported
from serving.inference.request import InferInput, InferOutput, InferRequest, InferResponse, RequestedOutput
from serving.protocol.grpc_codec import requested_output
from serving.protocol.tensors import DATATYPES, Buffer, Datatype, Shape, from_elements, num_elements, to_array

MAX_RANK = 32
"""Of a declared shape. No model comes near, and the product of a million dimensions takes minutes."""

MAX_JSON_BYTES = 4 << 20
MAX_JSON_LISTS = 100_000
"""Lists and objects. While JSON is parsed, all of Python waits, and a list takes thirty times its size in JSON."""

_INT64 = 1 << 63
_TYPES: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}, "O": {str}}
"""What JSON may hold for each kind of numpy's data types. Never converted: 1.7 is no UINT8, and "1" no number."""


@dataclass(slots=True)
class OutputForm:
    """Which outputs are wanted as bytes after the JSON, and which in it.

    Args:
        binary: of an output that `by_name` does not mention.
    """

    binary: bool = False
    by_name: dict[str, bool] = field(default_factory=dict)


def parse_json(body: Buffer) -> dict[str, Any]:
    """The object in a body.

    Raises:
        InvalidArgument: it is no JSON, no object, or too long.
    """
    if len(body) > MAX_JSON_BYTES:
        raise InvalidArgument(
            f"JSON of {len(body)} bytes is too long: at most {MAX_JSON_BYTES} are accepted; send tensors as binary data"
        )
    try:
        text = str(body, "utf-8")
        if text.count("[") + text.count("{") > MAX_JSON_LISTS:
            raise InvalidArgument(
                f"JSON with more than {MAX_JSON_LISTS} lists and objects: send tensors as binary data"
            )
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the request is no JSON: {error}") from error
    message: dict[str, Any] = _expect(dict, value, "the request")
    return message


def parse_request(
    body: bytes, header_length: int | None, model_name: str, model_version: str
) -> tuple[InferRequest, OutputForm]:
    """The inference in a body, and the form of its answer.

    Args:
        header_length: how much of the body is JSON; None if all of it is.

    Raises:
        InvalidArgument: it is malformed or contradicts itself.
        Unsupported: it refers to shared memory.
    """
    if header_length is None:
        message, tail = parse_json(body), None
    elif header_length <= len(body):
        view = memoryview(body)
        message, tail = parse_json(view[:header_length]), view[header_length:]
    else:
        raise InvalidArgument(f"the JSON is said to have {header_length} bytes, but the whole body has {len(body)}")
    parameters = _parameters(message, "the request")
    outputs, form = _parse_outputs(message, parameters.pop("binary_data_output", False))
    request = InferRequest(
        model_name=model_name,
        model_version=model_version,
        id=_expect(str, message.get("id", ""), "'id'"),
        inputs=_parse_inputs(message, tail),
        outputs=outputs,
        parameters=parameters,
    )
    return request, form


def render_response(response: InferResponse, form: OutputForm) -> tuple[bytes, int | None]:
    """The body of an answer, and how much of it is JSON if that is not all.

    Raises:
        InvalidArgument: JSON cannot hold an output.
    """
    outputs: list[dict[str, Any]] = []
    tail: list[Buffer] = []
    for output in response.outputs:
        rendered: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if form.by_name.get(output.name, form.binary):
            rendered["parameters"] = {"binary_data_size": len(output.data)}
            tail.append(output.data)
        else:
            rendered["data"] = _elements(output)
        outputs.append(rendered)
    message: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        message["id"] = response.id
    message["outputs"] = outputs
    header = json.dumps(message, separators=(",", ":")).encode()
    return (b"".join([header, *tail]), len(header)) if tail else (header, None)


def _parse_outputs(message: dict[str, Any], binary: Any) -> tuple[list[RequestedOutput], OutputForm]:
    form = OutputForm(_expect(bool, binary, "parameter 'binary_data_output'"))
    requested = []
    for output in _expect(list, message.get("outputs", []), "'outputs'"):
        name = _name(output, "output")
        parameters = _parameters(output, f"output '{name}'")
        if "binary_data" in parameters:
            form.by_name[name] = _expect(bool, parameters["binary_data"], f"binary_data of output '{name}'")
        requested.append(requested_output(name, parameters))
    return requested, form


def _parse_inputs(message: dict[str, Any], tail: memoryview | None) -> list[InferInput]:
    """The inputs. `tail`: the bytes after the JSON, which the inputs share out and use up; None for none at all."""
    inputs = []
    at = 0
    for given in _expect(list, message.get("inputs"), "'inputs'"):
        name = _name(given, "input")
        size = _binary_size(given, name)
        shape = _shape(given.get("shape"), name)
        datatype = _expect(str, given.get("datatype"), f"datatype of input '{name}'")
        if size is None:
            data: Buffer = _from_list(given, name, datatype, shape)
        elif tail is None:
            raise InvalidArgument(
                f"input '{name}' has a binary_data_size, but header "
                "Inference-Header-Content-Length does not say where the JSON ends"
            )
        else:
            data = tail[at : at + size]
            at += size
        inputs.append(InferInput(name, datatype, shape, data))
    if tail is not None and at != len(tail):
        raise InvalidArgument(f"expected {at} bytes after the JSON, the sum of all binary_data_size, got {len(tail)}")
    return inputs


def _binary_size(given: dict[str, Any], name: str) -> int | None:
    parameters = _parameters(given, f"input '{name}'")
    if "shared_memory_region" in parameters:
        raise Unsupported(f"input '{name}' is in shared memory, which this server does not read")
    if "binary_data_size" not in parameters:
        return None
    size: int = _expect(int, parameters["binary_data_size"], f"binary_data_size of input '{name}'")
    if size < 0:
        raise InvalidArgument(f"binary_data_size of input '{name}' must not be negative, got {_brief(size)}")
    if "data" in given:
        raise InvalidArgument(f"input '{name}' has both data and a binary_data_size: expected one of them")
    return size


def _shape(value: Any, name: str) -> Shape:
    dimensions = _expect(list, value, f"shape of input '{name}'")
    if len(dimensions) > MAX_RANK:
        raise InvalidArgument(f"shape of input '{name}' has {len(dimensions)} dimensions: at most {MAX_RANK} will do")
    for size in dimensions:
        if type(size) is not int or not 0 <= size < _INT64:
            raise InvalidArgument(f"shape of input '{name}' must hold whole numbers from 0, got {_brief(size)}")
    shape = tuple(dimensions)
    if num_elements(shape) >= _INT64:
        raise InvalidArgument(f"shape of input '{name}' has more elements than there are 64-bit integers")
    return shape


def _from_list(given: dict[str, Any], name: str, datatype_name: str, shape: Shape) -> bytes:
    """The tensor in `data`, a flat or nested list, as raw bytes."""
    datatype = DATATYPES.get(datatype_name)
    if datatype is None:
        raise InvalidArgument(f"input '{name}': there is no data-type {_brief(datatype_name)}")
    if datatype.name == "FP16":
        raise InvalidArgument(f"input '{name}': FP16 is only accepted as binary data")
    if "data" not in given:
        raise InvalidArgument(f"input '{name}' has neither data nor a binary_data_size")
    elements = _flatten(_expect(list, given["data"], f"data of input '{name}'"), name)
    if len(elements) != num_elements(shape):
        raise InvalidArgument(
            f"input '{name}': expected {num_elements(shape)} elements for shape {list(shape)}, got {len(elements)}"
        )
    return _to_bytes(datatype, elements, name)


def _flatten(data: list[Any], name: str) -> list[Any]:
    while data and type(data[0]) is list:
        if any(type(row) is not list for row in data) or len({len(row) for row in data}) > 1:
            raise InvalidArgument(f"data of input '{name}' is ragged: lists side by side must have the same length")
        data = [element for row in data for element in row]
    return data


def _to_bytes(datatype: Datatype, elements: list[Any], name: str) -> bytes:
    allowed = _TYPES[datatype.dtype.kind]
    if not set(map(type, elements)) <= allowed:
        wrong = next(element for element in elements if type(element) not in allowed)
        raise InvalidArgument(f"data of input '{name}' must be of {datatype.name}, got {_brief(wrong)}")
    try:
        with np.errstate(over="raise"):
            return from_elements(datatype, elements)
    except (InvalidArgument, FloatingPointError) as error:
        raise InvalidArgument(f"data of input '{name}': an element does not fit {datatype.name}: {error}") from error


def _elements(output: InferOutput) -> list[Any]:
    """A tensor as a flat list for JSON."""
    if output.datatype == "FP16":
        raise InvalidArgument(f"output '{output.name}' is FP16, which JSON does not carry: ask for binary data")
    flat = to_array(DATATYPES[output.datatype], output.shape, output.data).ravel()
    elements: list[Any] = flat.tolist()
    if output.datatype != "BYTES":
        return elements
    try:
        return [str(element, "utf-8") for element in elements]
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"output '{output.name}' holds bytes that are no UTF-8, which JSON does not carry: ask for binary data"
        ) from error


def _parameters(holder: dict[str, Any], what: str) -> dict[str, Any]:
    parameters: dict[str, Any] = _expect(dict, holder.get("parameters", {}), f"'parameters' of {what}")
    for name, value in parameters.items():
        if type(value) not in (str, bool, int, float):
            raise InvalidArgument(
                f"parameter {_brief(name)} of {what} must be a string, number or bool, got {_brief(value)}"
            )
        if type(value) is int and not -_INT64 <= value < _INT64:
            raise InvalidArgument(f"parameter {_brief(name)} of {what} does not fit in 64 bits")
    return parameters


def _name(holder: Any, what: str) -> str:
    name: str = _expect(str, _expect(dict, holder, f"an {what}").get("name"), f"the name of an {what}")
    return name


_WORDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", bool: "true or false"}


def _expect(kind: type, value: Any, what: str) -> Any:
    if type(value) is not kind:
        got = "nothing" if value is None else _brief(value)
        raise InvalidArgument(f"{what} must be {_WORDS[kind]}, got {got}")
    return value


def _brief(value: Any) -> str:
    """A value in an error message: never long, whatever the caller sent."""
    if type(value) in (list, dict):
        return _WORDS[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
