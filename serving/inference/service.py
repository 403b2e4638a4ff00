"""The RPCs, transport-neutral: bytes in, bytes out. `ModelInfer` goes to the batcher, everything else is answered here.

A transport looks a method's full path up in `Service.unary`, or calls `Service.infer`; HTTP calls the methods that give
messages, and `Service.submit`. Nothing here knows gRPC or HTTP.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import DecodeError, Message

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from serving.errors import Internal, InvalidArgument, ServingError, Unavailable, Unsupported, quote
from serving.inference.batcher import BatcherClosed
from serving.inference.plan import Plan, varint
from serving.inference.request import Done, InferRequest, RequestHandle, ResponseSink
from serving.inference.requests import CachedPlan, GrpcRequest, HttpRequest, PlannedRequest
from serving.models.repository import Model, Repository
from serving.observability.health import Health
from serving.observability.statistics import Duration, Snapshot
from serving.protocol.grpc_codec import decode_request, parse_request

logger = logging.getLogger(__name__)

SERVICE_NAME = "inference.GRPCInferenceService"
HEALTH_NAME = "grpc.health.v1.Health"
INFER = f"/{SERVICE_NAME}/ModelInfer"
STREAM_INFER = f"/{SERVICE_NAME}/ModelStreamInfer"
HEALTH_CHECK = f"/{HEALTH_NAME}/Check"
HEALTH_WATCH = f"/{HEALTH_NAME}/Watch"

SERVER_NAME = "convoy"
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""Of the protocol, by Triton's names for them."""

_UNSUPPORTED_RPCS = {
    "SystemSharedMemoryStatus": "shared memory",
    "SystemSharedMemoryRegister": "shared memory",
    "SystemSharedMemoryUnregister": "shared memory",
    "CudaSharedMemoryStatus": "shared memory",
    "CudaSharedMemoryRegister": "shared memory",
    "CudaSharedMemoryUnregister": "shared memory",
    "TraceSetting": "tracing",
    "LogSettings": "changing log settings at run time",
}

_MAX_LENGTHS = 256
_TEMPLATES_OF_A_LENGTH = 4
"""Clients whose messages differ in their beginning and not in their length do not push each other out."""
_SWAPS_IN_ONE_REQUEST = 8


class Service:
    """Every RPC over a model repository.

    Args:
        version: the server's own, for its metadata.
    """

    def __init__(self, repository: Repository, health: Health, *, version: str) -> None:
        self.repository = repository
        self.health = health
        self._version = version
        self._templates: dict[int, tuple[CachedPlan, ...]] = {}
        self._generation = repository.generation
        self.unary: Mapping[str, Callable[[bytes], bytes]] = self._unary()
        """By full method path: the serialised answer to a serialised request. They raise ServingError."""
        self.blocking = frozenset(f"/{SERVICE_NAME}/RepositoryModel{what}" for what in ("Load", "Unload"))
        """Paths in `unary` that may take seconds."""

    # -- inference ---------------------------------------------------------------------------------------------------

    def infer(self, payload: bytes, call: ResponseSink, deadline: float | None) -> RequestHandle | None:
        """Run a serialised ModelInferRequest. The answer, or the error, goes to `call`.

        Args:
            deadline: on the clock of `time.monotonic`.

        Returns:
            what is under way, for cancelling; None if the answer has been given already.
        """
        try:
            if self._generation != self.repository.generation:
                self._generation = self.repository.generation
                self._templates.clear()
            for template in self._templates.get(len(payload), ()):
                if payload.startswith(template.prefix):
                    job = GrpcRequest(template.plan, template.cut(payload), b"", call, deadline)
                    try:
                        template.plan.model.batcher.submit(job)
                        return job
                    except BatcherClosed:
                        self._templates.clear()
                        break
            return self._infer_unknown(payload, call, deadline)
        except ServingError as error:
            call.fail(error)
        except Exception:
            logger.exception("a request could not be run")
            call.fail(Internal("the request could not be run; the server's log says why"))
        return None

    def submit(self, request: InferRequest, done: Done, deadline: float | None) -> RequestHandle | None:
        """Run a request that has been parsed. As `infer`, but the answer, or the error, goes to `done`."""
        try:
            deadline = _earlier(deadline, request)
            return self._queue(request, lambda plan, buffers: HttpRequest(plan, buffers, request.id, done, deadline))
        except ServingError as error:
            done(error)
        return None

    def _infer_unknown(self, payload: bytes, call: ResponseSink, deadline: float | None) -> RequestHandle:
        """The way of a request that looks like none before."""
        generation = self.repository.generation
        message = decode_request(payload)
        request = parse_request(message)
        until = _earlier(deadline, request)
        encoded = request.id.encode()
        id_field = b"\x1a" + varint(len(encoded)) + encoded if encoded else b""
        job = self._queue(request, lambda plan, buffers: GrpcRequest(plan, buffers, id_field, call, until))
        is_same = not request.id and not request.parameters and not job.plan.has_strings
        if is_same and generation == self.repository.generation:  # else the plan may be of a version that is gone
            self._remember(payload, message, job.plan)
        return job

    def _queue(self, request: InferRequest, make: Callable[[Plan, tuple[Any, ...]], PlannedRequest]) -> PlannedRequest:
        for _ in range(_SWAPS_IN_ONE_REQUEST):
            plan = Plan(self.repository.get(request.model_name, request.model_version), request)
            job = make(plan, plan.bind_inputs([given.data for given in request.inputs]))
            try:
                plan.model.batcher.submit(job)
                return job
            except BatcherClosed:
                continue  # the version was replaced between the two lines; the repository has a newer one
        raise Unavailable(f"model '{request.model_name}' is being replaced")

    def _remember(self, payload: bytes, message: pb.ModelInferRequest, plan: Plan) -> None:
        """Recognise the next request that differs from this one in its tensors' bytes alone."""
        template = CachedPlan.of(payload, message, plan)
        if template is not None:
            if len(self._templates) >= _MAX_LENGTHS:
                self._templates.clear()
            others = self._templates.get(len(payload), ())
            self._templates[len(payload)] = (template, *others[: _TEMPLATES_OF_A_LENGTH - 1])

    # -- what is there -----------------------------------------------------------------------------------------------

    def is_live(self) -> bool:
        """Whether the server answers at all."""
        return True

    def is_ready(self) -> bool:
        """Whether every model asked for is ready and the server is not about to leave."""
        return self.health.check("readiness") == health_pb2.HealthCheckResponse.SERVING

    def is_model_ready(self, name: str, version: str) -> bool:
        """Whether a model that exists can be asked.

        Raises:
            NotFound: it does not exist.
        """
        if not version:
            return bool(self.repository.versions(name))
        try:
            self.repository.get(name, version)
        except Unavailable:
            return False
        return True

    def server_metadata(self) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=self._version, extensions=EXTENSIONS)

    def model_metadata(self, name: str, version: str) -> pb.ModelMetadataResponse:
        model = self.repository.get(name, version)
        answer = pb.ModelMetadataResponse(
            name=name, versions=self.repository.versions(name), platform=model.spec.platform
        )
        for field, specs in ((answer.inputs, model.spec.inputs), (answer.outputs, model.spec.outputs)):
            for spec in specs:
                field.add(name=spec.name, datatype=spec.datatype.name, shape=spec.shape)
        return answer

    def model_config(self, name: str, version: str) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=self.repository.get(name, version).spec.config)

    def model_statistics(self, name: str, version: str) -> pb.ModelStatisticsResponse:
        """Of one version, of all ready versions of a model, or, without a name, of everything."""
        models = self.repository.ready_models()
        if name:
            self.repository.get(name, version)
            models = [model for model in models if model.spec.name == name and version in ("", model.version)]
        return pb.ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])

    def repository_index(self, ready_only: bool) -> pb.RepositoryIndexResponse:
        answer = pb.RepositoryIndexResponse()
        for entry in self.repository.index(ready_only):
            answer.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return answer

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load or reload a model; blocks until it is ready or has failed.

        Args:
            parameters: `config`, a ModelConfig as JSON in place of the model's file.
        """
        for parameter in parameters.keys() - {"config"}:
            raise Unsupported(f"load parameter {quote(parameter)} is not supported: expected 'config'")
        config = parameters.get("config")
        if config is not None and not isinstance(config, str):
            raise InvalidArgument("load parameter 'config' must be a string of JSON")
        self.repository.load(name, config)

    def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Unload a model; blocks until what it was asked is answered."""
        for parameter in parameters.keys() - {"unload_dependents"}:
            raise Unsupported(f"unload parameter {quote(parameter)} is not supported")
        self.repository.unload(name)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _unary(self) -> dict[str, Callable[[bytes], bytes]]:
        methods: dict[str, tuple[type[Message], Callable[[Any], Message]]] = {
            "ServerLive": (pb.ServerLiveRequest, lambda r: pb.ServerLiveResponse(live=self.is_live())),
            "ServerReady": (pb.ServerReadyRequest, lambda r: pb.ServerReadyResponse(ready=self.is_ready())),
            "ModelReady": (
                pb.ModelReadyRequest,
                lambda r: pb.ModelReadyResponse(ready=self.is_model_ready(r.name, r.version)),
            ),
            "ServerMetadata": (pb.ServerMetadataRequest, lambda r: self.server_metadata()),
            "ModelMetadata": (pb.ModelMetadataRequest, lambda r: self.model_metadata(r.name, r.version)),
            "ModelConfig": (pb.ModelConfigRequest, lambda r: self.model_config(r.name, r.version)),
            "ModelStatistics": (pb.ModelStatisticsRequest, lambda r: self.model_statistics(r.name, r.version)),
            "RepositoryIndex": (pb.RepositoryIndexRequest, lambda r: self.repository_index(r.ready)),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, self._unload),
        }
        handlers = {f"/{SERVICE_NAME}/{name}": _handler(kind, answer) for name, (kind, answer) in methods.items()}
        handlers |= {f"/{SERVICE_NAME}/{name}": _refusal(name, what) for name, what in _UNSUPPORTED_RPCS.items()}
        handlers[HEALTH_CHECK] = _handler(
            health_pb2.HealthCheckRequest,
            lambda r: health_response(self.health.check(r.service)),
        )
        return handlers

    def _load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        self.load(request.model_name, _repository_parameters(request))
        return pb.RepositoryModelLoadResponse()

    def _unload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        self.unload(request.model_name, _repository_parameters(request))
        return pb.RepositoryModelUnloadResponse()


def health_response(state: int) -> health_pb2.HealthCheckResponse:
    """A state of `serving.observability.health` as a message."""
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.ServingStatus.Name(state))


def stream_response(payload: bytes) -> bytes:
    """A serialised ModelInferResponse as a message of ModelStreamInfer (its field 2)."""
    return b"\x12" + varint(len(payload)) + payload


def stream_error(error: ServingError) -> bytes:
    """An error as a message of ModelStreamInfer: the stream goes on."""
    message: bytes = pb.ModelStreamInferResponse(error_message=str(error)).SerializeToString()
    return message


def _handler(kind: type[Message], answer: Callable[[Any], Message]) -> Callable[[bytes], bytes]:
    def handle(payload: bytes) -> bytes:
        try:
            request = kind.FromString(payload)
        except DecodeError as error:
            raise InvalidArgument(f"the {len(payload)} bytes received are no {kind.__name__}: {error}") from error
        try:
            answered: bytes = answer(request).SerializeToString()
            return answered
        except ServingError:
            raise
        except Exception as error:
            logger.exception("%s could not be answered", kind.__name__)
            raise Internal(f"the server failed on a {kind.__name__}; its log says why") from error

    return handle


def _refusal(name: str, what: str) -> Callable[[bytes], bytes]:
    def refuse(payload: bytes) -> bytes:
        raise Unsupported(f"{name}: this server does not support {what}")

    return refuse


def _earlier(deadline: float | None, request: InferRequest) -> float | None:
    """The deadline, or the request's own `timeout` (microseconds from now) if that is sooner."""
    timeout = request.parameters.get("timeout")
    if timeout is None:
        return deadline
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
        raise InvalidArgument(f"parameter 'timeout' must be a whole number of microseconds, got {quote(timeout)}")
    if timeout == 0:
        return deadline
    own = time.monotonic() + timeout * 1e-6
    return own if deadline is None else min(deadline, own)


def _repository_parameters(
    request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest,
) -> dict[str, Any]:
    values = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            values[name] = getattr(parameter, kind)
    return values


def _statistics(model: Model) -> pb.ModelStatistics:
    now: Snapshot = model.statistics.snapshot()
    message = pb.ModelStatistics(
        name=model.spec.name,
        version=model.version,
        last_inference=now.last_inference_ms,
        inference_count=now.inference_count,
        execution_count=now.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(now.success),
            fail=_duration(now.fail),
            queue=_duration(now.queue),
            compute_input=_duration(now.compute_input),
            compute_infer=_duration(now.compute_infer),
            compute_output=_duration(now.compute_output),
        ),
    )
    for size, spent in sorted(now.batch_sizes.items()):
        message.batch_stats.add(
            batch_size=size,
            compute_input=pb.StatisticDuration(count=spent.count, ns=spent.input_ns),
            compute_infer=pb.StatisticDuration(count=spent.count, ns=spent.infer_ns),
            compute_output=pb.StatisticDuration(count=spent.count, ns=spent.output_ns),
        )
    return message


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
