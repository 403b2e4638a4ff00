"""The endpoints of the REST API except inference."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import InvalidArgument, Unsupported, quote
from serving.frontends.http.body import read_body
from serving.frontends.http.executor import MAX_INLINE_BYTES, BoundedExecutor
from serving.frontends.http.responses import json_response
from serving.models.changes import Caller
from serving.protocol.admin import AdminService
from serving.protocol.json_codec import decode
from serving.protocol.json_messages import to_json
from serving.protocol.shared_memory import SharedMemoryService

NOT_READY = 400
"""As in Triton and the protocol: "a 4xx status code indicates false"."""

Endpoint = Callable[[Request], Awaitable[Response]]

_OBJECT_DECODER = msgspec.json.Decoder(dict[str, Any])


_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class _Registration(msgspec.Struct):
    """The body that registers shared memory."""

    key: str
    byte_size: _Count
    offset: _Count = 0


class AdminEndpoints:
    """Endpoints for the server and its models.

    Args:
        changes: loads and unloads models.
        bodies: parses large bodies.
    """

    def __init__(
        self, admin: AdminService, changes: BoundedExecutor, bodies: BoundedExecutor, max_body_bytes: int
    ) -> None:
        self._admin = admin
        self._changes = changes
        self._bodies = bodies
        self._max_body_bytes = max_body_bytes

    async def model_ready(self, request: Request) -> Response:
        name, version = _model(request)
        return _flag_response("ready", self._admin.is_model_ready(name, version), name=name)

    async def server_metadata(self, request: Request) -> Response:
        return json_response(to_json(self._admin.server_metadata()))

    async def model_metadata(self, request: Request) -> Response:
        return json_response(to_json(self._admin.model_metadata(*_model(request))))

    async def model_config(self, request: Request) -> Response:
        return json_response(to_json(self._admin.model_config(*_model(request)).config))

    async def statistics(self, request: Request) -> Response:
        return json_response(to_json(self._admin.model_statistics(*_model(request))))

    async def index(self, request: Request) -> Response:
        ready_only = (await self._json(request)).get("ready", False) is True
        return json_response([to_json(entry) for entry in self._admin.repository_index(ready_only).models])

    async def load(self, request: Request) -> Response:
        return await self._change(request, self._admin.load)

    async def unload(self, request: Request) -> Response:
        return await self._change(request, self._admin.unload)

    async def models(self, request: Request) -> Response:
        return json_response([to_json(model) for model in self._admin.control.models().models])

    async def model_state(self, request: Request) -> Response:
        return json_response(to_json(self._admin.control.models(_model(request)[0]).models[0]))

    async def promote(self, request: Request) -> Response:
        return await self._control(request, "promote")

    async def rollback(self, request: Request) -> Response:
        return await self._control(request, "rollback")

    async def pin(self, request: Request) -> Response:
        return await self._control(request, "pin")

    async def unpin(self, request: Request) -> Response:
        return await self._control(request, "unpin")

    async def _control(self, request: Request, verb: str) -> Response:
        def change(name: str, parameters: dict[str, Any], caller: Caller) -> Any:
            version = parameters.get("version", 0)
            if isinstance(version, bool) or not isinstance(version, int):
                raise InvalidArgument(f"parameter 'version' must be a whole number, got {quote(version)}")
            return to_json(self._admin.control.change(verb, name, version, caller))

        return await self._change(request, change)

    async def shared_memory_status(self, request: Request) -> Response:
        regions = to_json(self._shared_memory.status(_region(request)))["regions"]
        return json_response(list(regions.values()))

    async def register_shared_memory(self, request: Request) -> Response:
        try:
            given = msgspec.convert(await self._json(request), _Registration)
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"the request does not fit the protocol: {error}") from error
        self._shared_memory.register(_region(request), given.key, given.offset, given.byte_size)
        return json_response({})

    async def cuda_memory_status(self, request: Request) -> Response:
        return json_response(list(to_json(self._shared_memory.cuda_status(_region(request)))["regions"].values()))

    async def unregister_cuda_memory(self, request: Request) -> Response:
        return json_response({})

    async def unregister_shared_memory(self, request: Request) -> Response:
        self._shared_memory.unregister(_region(request))
        return json_response({})

    @property
    def _shared_memory(self) -> SharedMemoryService:
        assert self._admin.shared_memory is not None, "it has no routes"
        return self._admin.shared_memory

    async def unsupported(self, request: Request) -> Response:
        path = request.url.path
        hint = " without --allow-client-shm" if path.startswith("/v2/systemsharedmemory/") else ""
        raise Unsupported(f"{path}: this server does not support this part of Triton's API{hint}")

    async def _change(self, request: Request, change: Callable[[str, dict[str, Any], Caller], Any]) -> Response:
        """Changes a model, which may take seconds, outside the event loop, unless its caller leaves before."""
        message = await self._json(request)
        parameters = message.get("parameters")
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, dict):
            raise InvalidArgument("'parameters' must be an object")
        has_gone = threading.Event()
        caller = Caller(is_cancelled=has_gone.is_set)
        changing = asyncio.ensure_future(self._changes.run(change, _model(request)[0], parameters, caller))
        disconnecting = asyncio.ensure_future(request.receive())
        await asyncio.wait((changing, disconnecting), return_when=asyncio.FIRST_COMPLETED)
        if not changing.done():
            has_gone.set()
            changing.cancel()
            raise ClientDisconnect
        disconnecting.cancel()
        return json_response(changing.result() or {})

    async def _json(self, request: Request) -> dict[str, Any]:
        """Returns the object in the body; an empty one if there is no body."""
        body = await read_body(request.scope, request.receive, self._max_body_bytes, self._bodies)
        if len(body) > MAX_INLINE_BYTES:
            return await self._bodies.run(decode, body, _OBJECT_DECODER)
        return decode(body, _OBJECT_DECODER) if body else {}


class Probed(Protocol):
    """What probes ask for."""

    def is_live(self) -> bool:
        """Returns whether the server need not be restarted."""

    def is_ready(self) -> bool:
        """Returns whether the server should get requests."""


def health_routes(admin: Probed) -> list[Route]:
    """Returns the routes of the liveness and readiness probes."""

    async def live(request: Request) -> Response:
        return _flag_response("live", admin.is_live())

    async def ready(request: Request) -> Response:
        return _flag_response("ready", admin.is_ready())

    return [Route("/v2/health/live", live), Route("/v2/health/ready", ready)]


def _model(request: Request) -> tuple[str, str]:
    """Returns the model's name and version in the path; empty where it has none."""
    path = request.path_params
    return path.get("model", ""), path.get("version", "")


def _region(request: Request) -> str:
    """Returns the name of the region in the path; empty where it has none."""
    name: str = request.path_params.get("region", "")
    return name


def shared_memory_routes(endpoints: AdminEndpoints) -> list[Route]:
    """Returns the routes of Triton's extension for shared memory."""
    system, cuda = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
    return [
        *_of_regions(system, endpoints.shared_memory_status, endpoints.unregister_shared_memory),
        Route(f"{system}/region/{{region}}/register", endpoints.register_shared_memory, methods=["POST"]),
        *_of_regions(cuda, endpoints.cuda_memory_status, endpoints.unregister_cuda_memory),
    ]


def _of_regions(path: str, status: Endpoint, unregister: Endpoint) -> Iterator[Route]:
    """Yields the routes for all regions of a kind, and for one of them."""
    for each in (path, f"{path}/region/{{region}}"):
        yield Route(f"{each}/status", status)
        yield Route(f"{each}/unregister", unregister, methods=["POST"])


def _flag_response(key: str, value: bool, **others: str) -> Response:
    return json_response({**others, key: value}, 200 if value else NOT_READY)
