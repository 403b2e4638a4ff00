"""Changed messages for all RPCs and paths except inference."""

import json
import random
from collections.abc import Callable

from google.protobuf.message import DecodeError, Message

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from serving.protocol.methods import HEALTH_CHECK, INFERENCE_SERVICE
from tests.serving.fuzzing.json_mutations import JsonMutator
from tests.serving.fuzzing.message import GrpcMessage, HttpMessage
from tests.serving.fuzzing.oracle import (
    EXHAUSTED,
    INTERNAL,
    INVALID,
    NOT_FOUND,
    OK,
    UNAVAILABLE,
    UNIMPLEMENTED,
    Expected,
    version_errors,
)
from tests.serving.fuzzing.protobuf_mutations import Mutator, noise
from tests.serving.fuzzing.requests import MODELS, WORDS

SPARE = "spare"
"""The only model that messages load and unload; other messages do not name it."""

_MODEL_RPCS = {"ModelReady": pb.ModelReadyRequest, "ModelMetadata": pb.ModelMetadataRequest}
_MODEL_RPCS |= {"ModelConfig": pb.ModelConfigRequest, "ModelStatistics": pb.ModelStatisticsRequest}
_CHANGES = {
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest,
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest,
}
_EMPTY = {"ServerLive": pb.ServerLiveRequest, "ServerReady": pb.ServerReadyRequest}
_EMPTY |= {"ServerMetadata": pb.ServerMetadataRequest}
_REFUSED = ("TraceSetting", "LogSettings", "SystemSharedMemoryRegister", "CudaSharedMemoryStatus", "NoSuchMethod")

CONFIGS = (
    '{"max_batch_size": 4}',
    '{"max_batch_size": 8, "backend": "onnxruntime"}',
    "{}",
    "",
    "[]",
    "{",
    '{"max_batch_size": -1}',
    '{"max_batch_size": 2147483647}',
    '{"max_batch_size": 4, "max_batch_size": 5}',
    '{"instance_group": [{"count": 2}]}',
    '{"instance_group": [{"count": 10000}]}',
    '{"instance_group": [{"count": -1}]}',
    '{"version_policy": {"specific": {"versions": [7]}}}',
    '{"dynamic_batching": {"max_queue_delay_microseconds": 99999999999}}',
    '{"input": [{"name": "nothing", "data_type": "TYPE_FP32", "dims": [1]}]}',
    '{"name": "another"}',
    '{"nonsense": 1}',
)


def grpc_message(rng: random.Random, number: int) -> GrpcMessage:
    """Returns a call of any unary RPC except ModelInfer."""
    choose = rng.choice([_empty, _model, _model, _index, _change, _refused, _health])
    path, message, judge = choose(rng)
    payload, changes = Mutator(rng, WORDS).mutate(message, rng.choice((0, 1, 1, 2)))
    if rng.random() < 0.1:
        payload, changes = noise(rng, rng.randbytes(rng.randint(0, 60))), ["random"]
    try:
        parsed = type(message).FromString(payload)
    except DecodeError:
        parsed = None
    if choose is _change and getattr(parsed, "model_name", "") in MODELS:
        parsed, payload, changes = message, message.SerializeToString(), []
    codes = judge(parsed) if parsed is not None else {UNIMPLEMENTED} if choose is _refused else {INVALID}
    if choose is _change:  # too many at a time are refused before they are read
        codes.add(EXHAUSTED)
    return GrpcMessage(number, path, [payload], [Expected(frozenset(codes))], changes)


_Choice = tuple[str, Message, Callable[..., set[int]]]


def _path(name: str) -> str:
    return f"/{INFERENCE_SERVICE}/{name}"


def _empty(rng: random.Random) -> _Choice:
    name = rng.choice(list(_EMPTY))
    return _path(name), _EMPTY[name](), lambda _: {OK}


def _model(rng: random.Random) -> _Choice:
    name = rng.choice(list(_MODEL_RPCS))
    version = rng.choice(["", "1"])
    message = _MODEL_RPCS[name](name=rng.choice(list(MODELS)), version=version)

    def judge(request: pb.ModelReadyRequest) -> set[int]:
        if name == "ModelStatistics" and not request.name:
            return {OK, INVALID, NOT_FOUND}
        codes = version_errors(request.name, request.version) or {OK}
        return codes | {OK} if name == "ModelReady" else codes

    return _path(name), message, judge


def _index(rng: random.Random) -> _Choice:
    message = pb.RepositoryIndexRequest(ready=rng.random() < 0.5, repository_name=rng.choice(["", "models"]))
    return _path("RepositoryIndex"), message, lambda _: {OK}


def _change(rng: random.Random) -> _Choice:
    name = rng.choice(list(_CHANGES))
    message = _CHANGES[name](model_name=SPARE)
    if name == "RepositoryModelLoad" and rng.random() < 0.7:
        message.parameters["config"].string_param = rng.choice(CONFIGS)
    right = {OK, INVALID, UNIMPLEMENTED, UNAVAILABLE, EXHAUSTED}
    if name == "RepositoryModelLoad":  # as in Triton, whatever the reason for which a model cannot be loaded
        right.add(INTERNAL)
    return (
        _path(name),
        message,
        lambda request: right if request.model_name == SPARE else {NOT_FOUND, INVALID, UNIMPLEMENTED},
    )


def _refused(rng: random.Random) -> _Choice:
    return _path(rng.choice(_REFUSED)), pb.ModelReadyRequest(name="x"), lambda _: {UNIMPLEMENTED}


def _health(rng: random.Random) -> _Choice:
    known = ("", "liveness", "readiness", *MODELS)
    message = health_pb2.HealthCheckRequest(service=rng.choice(known))
    return HEALTH_CHECK, message, lambda request: {OK} if request.service in known else {OK, NOT_FOUND}


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def http_message(rng: random.Random, number: int) -> HttpMessage:
    """Returns a request for any path except infer."""
    model = rng.choice([*MODELS, "nothing", "%00", "%2e%2e", "a" * 300])
    under = rng.choice(["", "/versions/1", "/versions/7", "/versions/x"])
    kind = rng.randrange(5)
    statuses = {200, 400, 404, 501}
    if kind == 0:
        method, target = "GET", rng.choice(["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats"])
        statuses = {200}
    elif kind == 1:
        method, target = "GET", f"/v2/models/{model}{under}{rng.choice(['', '/ready', '/config', '/stats'])}"
    elif kind == 2:
        method, target = "POST", "/v2/repository/index"
    elif kind == 3:
        method, target = "POST", f"/v2/repository/models/{SPARE}/{rng.choice(['load', 'unload'])}"
        statuses |= {429, 500, 503}
    else:
        method = rng.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
        target = rng.choice(
            ["/", "/v2/", f"/v2/models/{model}/infer", "/v2/repository/index", "/v3", "/v2/logging", "//", "/%"]
        )
        statuses |= {405}
    body, changes = b"", []
    if method == "POST":
        value = rng.choice([{}, {"ready": True}, {"parameters": {"config": rng.choice(CONFIGS)}}])
        body, changes = JsonMutator(rng, WORDS).mutate(json.loads(json.dumps(value)), rng.choice((0, 1, 1, 2)))
    return HttpMessage(number, method, target, {}, body, None, changes, frozenset(statuses))
