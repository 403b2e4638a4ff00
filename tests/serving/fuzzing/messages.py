"""Messages by seed and number: the same two always give the same message."""

import gzip
import random
import zlib
from typing import Any
from urllib.parse import quote

from protos import grpc_service_pb2 as pb
from serving.protocol.methods import INFER, STREAM_INFER
from serving.protocol.tensors import to_bytes
from tests.serving.fuzzing import admin
from tests.serving.fuzzing.http_oracle import expect_http
from tests.serving.fuzzing.json_mutations import JsonMutator
from tests.serving.fuzzing.message import GrpcMessage, HttpMessage
from tests.serving.fuzzing.oracle import expect_infer
from tests.serving.fuzzing.protobuf_mutations import ODD_TEXT, Mutator
from tests.serving.fuzzing.requests import MODELS, WORDS, Request, random_request, to_protobuf

STREAM_LENGTH = 12


def generator(seed: int, number: int) -> random.Random:
    """Returns the source of all randomness of a message."""
    return random.Random(f"{seed}/{number}")


def num_changes(rng: random.Random) -> int:
    return rng.choice((0, 1, 1, 1, 2, 2, 3, 5))


def grpc_message(seed: int, number: int) -> GrpcMessage:
    """Returns a message for gRPC: mostly ModelInfer, some other RPCs, a few streams."""
    rng = generator(seed, number)
    kind = rng.random()
    if kind < 0.1:
        return admin.grpc_message(rng, number)
    if kind < 0.11:
        made = [_infer(rng) for _ in range(rng.randint(0, STREAM_LENGTH))]
        changes = [change for _, names in made for change in names]
        payloads = [payload for payload, _ in made]
        ends_on_error = rng.random() < 0.3
        return GrpcMessage(number, STREAM_INFER, payloads, list(map(expect_infer, payloads)), changes, ends_on_error)
    payload, changes = _infer(rng)
    return GrpcMessage(number, INFER, [payload], [expect_infer(payload)], changes)


def _infer(rng: random.Random) -> tuple[bytes, list[str]]:
    """Returns a changed ModelInferRequest; sometimes two in one, which protobuf merges."""
    message = to_protobuf(random_request(rng), typed=rng.random() < 0.3)
    payload, changes = Mutator(rng, WORDS).mutate(message, num_changes(rng))
    if rng.random() < 0.02:
        other = pb.ModelInferRequest(model_name=message.model_name)
        changes.append("merge")
        payload += (other if rng.random() < 0.5 else message).SerializeToString()
    return payload, changes


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def http_message(seed: int, number: int) -> HttpMessage:
    """Returns a request for HTTP: mostly infer, with tensors in JSON, as bytes or both; some of the other paths."""
    rng = generator(seed, number)
    if rng.random() < 0.1:
        return admin.http_message(rng, number)
    request = random_request(rng)
    value, tail = http_value(rng, request, rng.choice(["json", "binary", "mixed"]))
    text, changes = JsonMutator(rng, WORDS).mutate(value, num_changes(rng))
    model, version = request.model, request.version
    if rng.random() < 0.03:
        model = rng.choice([*WORDS, *ODD_TEXT])
        changes.append("model")
    if rng.random() < 0.03:
        version = rng.choice([*WORDS, *ODD_TEXT])
        changes.append("version")
    length, body = _join(rng, text, tail, changes)
    expected = expect_http(model, version, body, length)
    target = (
        f"/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "") + "/infer"
    )
    headers = {} if length is None else {"Inference-Header-Content-Length": length.decode("latin-1")}
    message = HttpMessage(number, "POST", target, headers, body, expected, changes)
    _compress(rng, message)
    if not model or "/" in model + version:  # no route: the server does not read the body
        message.expected, message.statuses = None, frozenset({404})
    message.is_chunked = rng.random() < 0.05
    return message


def http_value(rng: random.Random, request: Request, style: str) -> tuple[dict[str, Any], bytes]:
    """Returns the JSON of a request, and the bytes that follow it.

    Args:
        style: "json", "binary" or "mixed"; FP16, and strings that are not UTF-8, are binary in any case.
    """
    datatypes = {tensor.name: tensor.datatype for tensor in MODELS[request.model].inputs}
    inputs, tail = [], []
    for name, array in request.arrays.items():
        given: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatypes[name]}
        is_text = array.dtype != object or all(_decodes(element) for element in array.ravel())
        if style == "binary" or (style == "mixed" and rng.random() < 0.5) or datatypes[name] == "FP16" or not is_text:
            tail.append(to_bytes(array))
            given["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            values = array if rng.random() < 0.5 else array.ravel()
            given["data"] = _texts(values.tolist())
        inputs.append(given)
    value: dict[str, Any] = {"inputs": inputs}
    if request.id:
        value["id"] = request.id
    if request.outputs:
        value["outputs"] = [_http_output(rng, name, classes, style) for name, classes in request.outputs]
    if request.parameters or style == "binary":
        value["parameters"] = dict(request.parameters)
        if style == "binary" and rng.random() < 0.8:
            value["parameters"]["binary_data_output"] = True
    return value, b"".join(tail)


def _http_output(rng: random.Random, name: str, classes: int, style: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {"classification": classes} if classes else {}
    if style != "json" and rng.random() < 0.5:
        parameters["binary_data"] = rng.random() < 0.7
    return {"name": name, "parameters": parameters} if parameters else {"name": name}


def _decodes(element: bytes) -> bool:
    try:
        element.decode()
    except UnicodeDecodeError:
        return False
    return True


def _texts(values: Any) -> Any:
    if isinstance(values, list):
        return [_texts(value) for value in values]
    return values.decode() if isinstance(values, bytes) else values


def _join(rng: random.Random, text: bytes, tail: bytes, changes: list[str]) -> tuple[bytes | None, bytes]:
    """Returns the header Inference-Header-Content-Length and the body, sometimes wrong."""
    length: bytes | None = str(len(text)).encode() if tail or rng.random() < 0.1 else None
    if rng.random() < 0.08:
        changes.append("header length")
        wrong = (str(len(text) + rng.choice([-1, 1, 7])), "0", str(len(text + tail) + 1), "-1", "1.0", "x", "9" * 30)
        length = rng.choice([None, b"", *(text.encode() for text in wrong)])
    if rng.random() < 0.08:
        changes.append("tail")
        tail = rng.choice([tail[:-1], tail + b"\0", tail * 2, b"", tail[1:]])
    return length, text + tail


def _compress(rng: random.Random, message: HttpMessage) -> None:
    """Compresses a few of the bodies."""
    kind = rng.random()
    if kind < 0.03:
        message.body, message.headers["Content-Encoding"] = gzip.compress(message.body, 1), "gzip"
    elif kind < 0.05:
        message.body, message.headers["Content-Encoding"] = zlib.compress(message.body, 1), "deflate"
    elif kind < 0.06:
        message.headers["Content-Encoding"] = rng.choice(["gzip", "deflate", "br", "identity, gzip"])
        message.expected, message.statuses = None, frozenset({400, 415})
        message.changes.append("content encoding")
