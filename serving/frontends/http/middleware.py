"""ASGI middleware around all requests to the API: access log, closing of connections, authentication."""

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convoy.auth import Token
from serving.errors import Unauthenticated
from serving.frontends.http.responses import error_response
from serving.observability.health import Health
from serving.observability.logging import AccessLog

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
"""Paths that need no token: Kubernetes' probes have none."""


def build_middleware(health: Health, token: Token | None, access_log: AccessLog | None) -> list[Middleware]:
    """Returns the middleware, outermost first: the log has refused requests too, and refusals close connections too."""
    middleware = [Middleware(DrainMiddleware, health=health)]
    if access_log is not None:
        middleware.insert(0, Middleware(AccessLogMiddleware, access_log=access_log))
    if token is not None:
        middleware.append(Middleware(AuthMiddleware, token=token))
    return middleware


class AccessLogMiddleware:
    """Writes an entry to the access log when a response has been sent."""

    def __init__(self, app: ASGIApp, access_log: AccessLog) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, port = scope["client"] or ("", 0)
        path = scope["raw_path"].decode("latin-1")  # not decoded further: it might hold a line break
        log_end = self._access_log.begin(f"{scope['method']} {path}", f"{host}:{port}")
        status = 0

        async def send_and_log(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                log_end(status)

        await self._app(scope, receive, send_and_log)


class DrainMiddleware:
    """Closes each connection after its next response while the server drains, so that clients move to another one."""

    def __init__(self, app: ASGIApp, health: Health) -> None:
        self._app = app
        self._health = health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_and_close if self._health.is_draining else send)


class AuthMiddleware:
    """Refuses requests without the server's token."""

    def __init__(self, app: ASGIApp, token: Token) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS or self._token.accepts(_authorization(scope)):
            await self._app(scope, receive, send)
        else:
            error = Unauthenticated("expected header 'Authorization: Bearer TOKEN' with this server's token")
            await error_response(error)(scope, receive, send)


def _authorization(scope: Scope) -> str | None:
    value = dict(scope["headers"]).get(b"authorization")
    return None if value is None else value.decode("latin-1")
