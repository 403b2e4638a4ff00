"""The REST API (Open Inference Protocol v2 with Triton's extensions) as an ASGI application. The paths are its table.

Knows how the service's answers look in JSON, and nothing of sockets.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convoy.auth import Token
from serving.errors import InvalidArgument, Unauthenticated, Unsupported
from serving.frontends.http.answers import EXCEPTION_HANDLERS, error_response, json_response
from serving.frontends.http.body import read_body
from serving.frontends.http.infer import InferEndpoint, LoopBridge
from serving.inference.service import Service
from serving.observability.logging import AccessLog
from serving.protocol.json_codec import parse_json
from serving.protocol.json_messages import to_json

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
"""Answered without a token: probes have none."""

NOT_READY = 400
"""As Triton and the protocol have it ("a 4xx status code indicates false")."""


def build_app(service: Service, *, max_body_bytes: int, token: Token | None, access_log: AccessLog | None) -> ASGIApp:
    """The application, for the running event loop. Inference comes first in the table, as most requests are for it."""
    infer = InferEndpoint(service, LoopBridge(asyncio.get_running_loop()), max_body_bytes)
    api = _Api(service, max_body_bytes)
    model = "/v2/models/{model}"
    version = "/v2/models/{model}/versions/{version}"
    app = Starlette(
        routes=[
            Route(f"{model}/infer", infer, methods=["POST"]),
            Route(f"{version}/infer", infer, methods=["POST"]),
            *_health_routes(service),
            Route("/v2", api.server_metadata),
            Route("/v2/models/stats", api.statistics),
            *(Route(f"{path}/ready", api.model_ready) for path in (model, version)),
            *(Route(f"{path}/config", api.model_config) for path in (model, version)),
            *(Route(f"{path}/stats", api.statistics) for path in (model, version)),
            *(Route(path, api.model_metadata) for path in (model, version)),
            Route("/v2/repository/index", api.index, methods=["POST"]),
            Route("/v2/repository/models/{model}/load", api.load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", api.unload, methods=["POST"]),
            *(Route(path, api.unsupported, methods=["GET", "POST"]) for path in _UNSUPPORTED_PATHS),
        ],
        middleware=[Middleware(AuthMiddleware, service=service, token=token, access_log=access_log)],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.router.redirect_slashes = False
    return app


def build_metrics_app(service: Service, render: Callable[[], bytes], content_type: str) -> ASGIApp:
    """`GET /metrics`; and health, for probes that cannot show the certificate that the API may ask for."""

    async def metrics(request: Request) -> Response:
        return Response(render(), media_type=content_type)

    routes = [Route("/metrics", metrics), *_health_routes(service)]
    return Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS)


def _health_routes(service: Service) -> list[Route]:
    async def live(request: Request) -> Response:
        return _yes_or_no("live", service.is_live())

    async def ready(request: Request) -> Response:
        return _yes_or_no("ready", service.is_ready())

    return [Route("/v2/health/live", live), Route("/v2/health/ready", ready)]


_UNSUPPORTED_PATHS = (
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
    "/v2/trace/setting",
    "/v2/models/{model}/trace/setting",
    "/v2/logging",
    "/v2/models/{model}/generate",
    "/v2/models/{model}/generate_stream",
)
"""Triton's paths that have no meaning here."""


class _Api:
    """Everything but inference."""

    def __init__(self, service: Service, max_body_bytes: int) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._blocking = ThreadPoolExecutor(1, thread_name_prefix="http-blocking")

    async def model_ready(self, request: Request) -> Response:
        name, version = _model(request)
        return _yes_or_no("ready", self._service.is_model_ready(name, version), name=name)

    async def server_metadata(self, request: Request) -> Response:
        return json_response(to_json(self._service.server_metadata()))

    async def model_metadata(self, request: Request) -> Response:
        return json_response(to_json(self._service.model_metadata(*_model(request))))

    async def model_config(self, request: Request) -> Response:
        return json_response(to_json(self._service.model_config(*_model(request)).config))

    async def statistics(self, request: Request) -> Response:
        answer = self._service.model_statistics(*_model(request))
        for model in answer.model_stats:  # perf_analyzer reads these whether or not there is a cache
            model.inference_stats.cache_hit.SetInParent()
            model.inference_stats.cache_miss.SetInParent()
        return json_response(to_json(answer))

    async def index(self, request: Request) -> Response:
        ready_only = (await self._json(request)).get("ready", False) is True
        return json_response([to_json(entry) for entry in self._service.repository_index(ready_only).models])

    async def load(self, request: Request) -> Response:
        return await self._change(request, self._service.load)

    async def unload(self, request: Request) -> Response:
        return await self._change(request, self._service.unload)

    async def unsupported(self, request: Request) -> Response:
        raise Unsupported(f"{request.url.path}: this server does not support that part of Triton's API")

    async def _change(self, request: Request, change: Callable[[str, dict[str, Any]], None]) -> Response:
        """Load or unload, which may take seconds, off the event loop."""
        message = await self._json(request)
        parameters = message.get("parameters", {})
        if not isinstance(parameters, dict):
            raise InvalidArgument("'parameters' must be an object")
        await asyncio.get_running_loop().run_in_executor(self._blocking, change, _model(request)[0], parameters)
        return json_response({})

    async def _json(self, request: Request) -> dict[str, Any]:
        """The object in the body; an empty one if there is no body."""
        body = await read_body(dict(request.scope["headers"]), request.receive, self._max_body_bytes)
        return parse_json(body) if body else {}


class AuthMiddleware:
    """What every request passes: the token, the access log, and the way out when the server is about to leave."""

    def __init__(self, app: ASGIApp, service: Service, token: Token | None, access_log: AccessLog | None) -> None:
        self._app = app
        self._service = service
        self._token = token
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._access_log is not None:
            send = _logged(self._access_log, scope, send)
        if self._service.health.is_draining:
            send = _closing(send)
        if self._token is None or scope["path"] in OPEN_PATHS or self._token.accepts(_authorization(scope)):
            await self._app(scope, receive, send)
        else:
            error = Unauthenticated("expected header 'Authorization: Bearer TOKEN' with this server's token")
            await error_response(error)(scope, receive, send)


def _model(request: Request) -> tuple[str, str]:
    """Name and version in the path; empty where it has none."""
    path = request.path_params
    return path.get("model", ""), path.get("version", "")


def _yes_or_no(what: str, answer: bool, **more: str) -> Response:
    return json_response({**more, what: answer}, 200 if answer else NOT_READY)


def _authorization(scope: Scope) -> str | None:
    value = dict(scope["headers"]).get(b"authorization")
    return None if value is None else value.decode("latin-1")


def _closing(send: Send) -> Send:
    """Each answer ends its connection: the client's next request finds a server that stays."""

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["connection"] = "close"
        await send(message)

    return send_and_close


def _logged(access_log: AccessLog, scope: Scope, send: Send) -> Send:
    host, port = scope["client"] or ("", 0)
    path = scope["raw_path"].decode("latin-1")  # as it came: decoded, it might hold a line break
    end = access_log.begin(f"{scope['method']} {path}", f"{host}:{port}")
    status = 0

    async def send_and_log(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            end(status)

    return send_and_log
