"""All RPCs except ModelInfer, as messages and over bytes: health, metadata, configuration, statistics, the repository.

HTTP calls the methods that return messages; gRPC front ends look up a method's path in `AdminService.unary`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from serving.errors import InvalidArgument, NotFound, Unavailable, Unsupported, quote
from serving.inference.shared_memory import SharedMemory
from serving.models.changes import ANYONE, Caller
from serving.models.repository import Model, Repository
from serving.observability.calls import Calls, method_of_rpc
from serving.observability.health import LIVENESS, READINESS, SERVING, Health
from serving.observability.statistics import Duration
from serving.protocol.control import ControlService
from serving.protocol.grpc_codec import decode, parameter_values
from serving.protocol.handling import handler
from serving.protocol.methods import HEALTH_CHECK, INFERENCE_SERVICE
from serving.protocol.shared_memory import SharedMemoryService

SERVER_NAME = "convoy"
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""Triton's names of the protocol extensions that the server supports."""

_MAX_WATCH_BYTES = 4096
_NO_SHARED_MEMORY = "shared memory without --allow-client-shm"
_UNSUPPORTED_RPCS = {
    "SystemSharedMemoryStatus": _NO_SHARED_MEMORY,
    "SystemSharedMemoryRegister": _NO_SHARED_MEMORY,
    "SystemSharedMemoryUnregister": _NO_SHARED_MEMORY,
    "CudaSharedMemoryStatus": "shared memory of GPUs",
    "CudaSharedMemoryRegister": "shared memory of GPUs",
    "CudaSharedMemoryUnregister": "shared memory of GPUs",
    "TraceSetting": "changing trace settings at run time",
    "LogSettings": "changing log settings at run time",
}


class AdminService:
    """The RPCs about the server and its models.

    Args:
        calls: counts the calls over gRPC.
        version: of the server, for its metadata.
        shared_memory: of clients; None to allow none.

    Attributes:
        unary: handlers by full method path. Each takes a serialised request, returns a serialised response, and raises
            a ServingError.
        blocking: the same for methods that may take seconds; these take their caller, too.
        control: promotes, pins and rolls back versions of models.
        shared_memory: registers shared memory of clients; None for a server that allows none.
    """

    def __init__(
        self,
        repository: Repository,
        health: Health,
        *,
        calls: Calls,
        version: str,
        shared_memory: SharedMemory | None = None,
    ) -> None:
        self.repository = repository
        self.health = health
        self._version = version
        self.control = ControlService(repository)
        self.shared_memory = None if shared_memory is None else SharedMemoryService(shared_memory)
        unary = {**self._handlers(), **self.control.unary}
        if self.shared_memory is not None:
            unary |= self.shared_memory.unary
        blocking = {
            **self.control.blocking,
            f"/{INFERENCE_SERVICE}/RepositoryModelLoad": handler(pb.RepositoryModelLoadRequest, self._load),
            f"/{INFERENCE_SERVICE}/RepositoryModelUnload": handler(pb.RepositoryModelUnloadRequest, self._unload),
        }
        self.unary: Mapping[str, Callable[[bytes], bytes]] = {
            path: calls.counted(method_of_rpc(path), handler) for path, handler in unary.items()
        }
        self.blocking: Mapping[str, Callable[[bytes, Caller], bytes]] = {
            path: calls.counted(method_of_rpc(path), handler) for path, handler in blocking.items()
        }

    # -- messages ----------------------------------------------------------------------------------------------------

    def is_live(self) -> bool:
        """Returns whether the server answers and no model hangs, which only a restart is sure to end."""
        return self.health.check(LIVENESS) == SERVING

    def is_ready(self) -> bool:
        """Returns whether every model that should be served is ready and the server is not shutting down."""
        return self.health.check(READINESS) == SERVING

    def is_model_ready(self, name: str, version: str) -> bool:
        """Returns whether a version of a model is ready; any version if `version` is empty.

        A model that does not exist is not ready, as in Triton: clients wait in loops for a model that is to come.

        Raises:
            InvalidArgument: the version is not a number.
        """
        try:
            self.repository.get(name, version)
        except (NotFound, Unavailable):
            return False
        return True

    def server_metadata(self) -> pb.ServerMetadataResponse:
        extensions = EXTENSIONS if self.shared_memory is None else (*EXTENSIONS, "system_shared_memory")
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=self._version, extensions=extensions)

    def model_metadata(self, name: str, version: str) -> pb.ModelMetadataResponse:
        model = self.repository.get(name, version)
        response = pb.ModelMetadataResponse(
            name=name, versions=self.repository.versions(name), platform=model.spec.platform or model.spec.backend
        )
        for field, specs in ((response.inputs, model.spec.inputs), (response.outputs, model.spec.outputs)):
            for spec in specs:
                field.add(name=spec.name, datatype=spec.datatype.name, shape=spec.shape)
        return response

    def model_config(self, name: str, version: str) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=self.repository.get(name, version).spec.config)

    def model_statistics(self, name: str, version: str) -> pb.ModelStatisticsResponse:
        """Returns the statistics of one version; of all ready versions of a model; or, without a name, of all models.

        Raises:
            NotFound: the model or version does not exist.
        """
        models = self.repository.ready_models()
        if name:
            number = self.repository.get(name, version).version
            models = [model for model in models if model.spec.name == name and (not version or model.version == number)]
        return pb.ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])

    def repository_index(self, ready_only: bool) -> pb.RepositoryIndexResponse:
        response = pb.RepositoryIndexResponse()
        for entry in self.repository.index(ready_only):
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return response

    def load(self, name: str, parameters: Mapping[str, Any], caller: Caller = ANYONE) -> None:
        """Loads or reloads a model. Blocks until the model is ready or has failed.

        Args:
            parameters: may hold `config`, a ModelConfig as JSON that replaces the model's file.
        """
        for parameter in parameters.keys() - {"config"}:
            raise Unsupported(f"load parameter {quote(parameter)} is not supported: expected 'config'")
        config = parameters.get("config")
        if config is not None and not isinstance(config, str):
            raise InvalidArgument("load parameter 'config' must be a string of JSON")
        with self.control.group.changing("load", name, caller, config):
            self.repository.load(name, config, caller)

    def unload(self, name: str, parameters: Mapping[str, Any], caller: Caller = ANYONE) -> None:
        """Unloads a model. Blocks until its queued requests are answered."""
        for parameter in parameters.keys() - {"unload_dependents"}:
            raise Unsupported(f"unload parameter {quote(parameter)} is not supported")
        with self.control.group.changing("unload", name, caller):
            self.repository.unload(name, caller)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, Callable[[bytes], bytes]]:
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
        }
        handlers = {f"/{INFERENCE_SERVICE}/{name}": handler(*method) for name, method in methods.items()}
        handlers |= {f"/{INFERENCE_SERVICE}/{name}": _refusal(name, part) for name, part in _UNSUPPORTED_RPCS.items()}
        handlers[HEALTH_CHECK] = handler(
            health_pb2.HealthCheckRequest, lambda r: health_response(self.health.check(r.service))
        )
        return handlers

    def _load(self, request: pb.RepositoryModelLoadRequest, caller: Caller) -> pb.RepositoryModelLoadResponse:
        self.load(request.model_name, parameter_values(request.parameters), caller)
        return pb.RepositoryModelLoadResponse()

    def _unload(self, request: pb.RepositoryModelUnloadRequest, caller: Caller) -> pb.RepositoryModelUnloadResponse:
        self.unload(request.model_name, parameter_values(request.parameters), caller)
        return pb.RepositoryModelUnloadResponse()


def watched_service(payload: bytes) -> str:
    """Returns the service that a serialised HealthCheckRequest names, which is kept while a client watches it.

    Raises:
        InvalidArgument: the message is malformed, or longer than the name of any model.
    """
    if len(payload) > _MAX_WATCH_BYTES:
        raise InvalidArgument(f"the name of a service has at most {_MAX_WATCH_BYTES} bytes, got {len(payload)}")
    service: str = decode(health_pb2.HealthCheckRequest, payload).service
    return service


def health_response(state: int) -> health_pb2.HealthCheckResponse:
    """Returns a state of `serving.observability.health` as a message."""
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.ServingStatus.Name(state))


def _refusal(name: str, part: str) -> Callable[[bytes], bytes]:
    def refuse(payload: bytes) -> bytes:
        raise Unsupported(f"{name}: this server does not support {part}")

    return refuse


def _statistics(model: Model) -> pb.ModelStatistics:
    now = model.statistics.snapshot()
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
            cache_hit=_duration(now.cache_hit),
            cache_miss=_duration(now.cache_miss),
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
