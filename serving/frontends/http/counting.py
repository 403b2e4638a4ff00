"""Counts the answers of HTTP's endpoints other than inference. Refusals are counted where errors become responses."""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.observability.calls import MODEL_INFER, Calls
from serving.protocol.status import OK, STATUS_NAMES

_METHODS_OF_ENDPOINTS = {
    "InferEndpoint": MODEL_INFER,
    "classify": MODEL_INFER,
    "live": "ServerLive",
    "ready": "ServerReady",
    "server_metadata": "ServerMetadata",
    "model_ready": "ModelReady",
    "model_metadata": "ModelMetadata",
    "model_config": "ModelConfig",
    "statistics": "ModelStatistics",
    "index": "RepositoryIndex",
    "load": "RepositoryModelLoad",
    "unload": "RepositoryModelUnload",
    "models": "ListModels",
    "model_state": "ListModels",
    "promote": "Promote",
    "rollback": "RollBack",
    "pin": "Pin",
    "unpin": "Unpin",
    "shared_memory_status": "SystemSharedMemoryStatus",
    "register_shared_memory": "SystemSharedMemoryRegister",
    "unregister_shared_memory": "SystemSharedMemoryUnregister",
    "cuda_memory_status": "CudaSharedMemoryStatus",
    "unregister_cuda_memory": "CudaSharedMemoryUnregister",
}
"""Names of the RPCs that do the same as HTTP's endpoints. Other endpoints count under their own names."""


def method_of(endpoint: object) -> str:
    """Returns the method under which the calls of an HTTP endpoint, a function or an object, are counted."""
    name = getattr(endpoint, "__name__", type(endpoint).__name__)
    return _METHODS_OF_ENDPOINTS.get(name, name)


def counted(routes: Sequence[Route], calls: Calls) -> list[Route]:
    """Returns routes that do the same, and count."""
    return [route if method_of(route.endpoint) == MODEL_INFER else _counted(route, calls) for route in routes]


def _counted(route: Route, calls: Calls) -> Route:
    endpoint: Callable[[Request], Awaitable[Response]] = route.endpoint
    method = method_of(endpoint)

    @wraps(endpoint)
    async def answer(request: Request) -> Response:
        began = time.monotonic()
        response = await endpoint(request)
        calls.record(method, STATUS_NAMES[OK], time.monotonic() - began)
        return response

    return Route(route.path, answer, methods=list(route.methods or ()))
