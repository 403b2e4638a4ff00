"""ASGI middleware around all requests: access log, closing of connections, refused hosts and sites, tokens."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convoy.auth import TokenFile
from convoy.same_origin import HostCheck, host_check, is_own_page
from serving.errors import PermissionDenied, quote
from serving.frontends.common.auth import CHANGES_SERVER
from serving.frontends.common.services import Services
from serving.frontends.common.status import shutting_down
from serving.frontends.http.auth import (
    OPEN_PATHS,
    PAGE_API,
    PRINCIPAL,
    AuthMiddleware,
    api_scopes,
    metrics_scopes,
    refuse,
)
from serving.frontends.http.responses import error_response
from serving.frontends.http.server import HttpServer
from serving.frontends.http.settings import HttpSettings
from serving.observability.logging import AccessLogEntry
from serving.observability.refusals import Refusals

CORS_METHODS = ("GET", "HEAD", "POST")
CORS_HEADERS = ("authorization", "content-encoding", "content-type", "inference-header-content-length", "traceparent")
"""Of requests that a web page may send. Never cookies: a token is a header, which the page must have itself."""
CORS_EXPOSED = ("inference-header-content-length", "retry-after")
"""Headers of responses that a web page may read."""
CORS_MAX_AGE_S = 600


def build_middleware(
    services: Services,
    server: HttpServer,
    tokens: TokenFile | None,
    access_log: bool,
    settings: HttpSettings,
    max_body_bytes: int,
) -> list[Middleware]:
    """Returns the middleware, outermost first: the log has refused requests too, and refusals close connections too."""
    refusals = services.inference.refusals
    middleware = []
    if access_log:
        middleware.append(Middleware(AccessLogMiddleware))
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=CORS_METHODS,
            allow_headers=CORS_HEADERS,
            allow_credentials=False,
            expose_headers=CORS_EXPOSED,
            max_age=CORS_MAX_AGE_S,
        )
        middleware.append(cors)
    middleware.append(Middleware(DrainMiddleware, services=services, server=server))
    if (hosts := checked_hosts(server, tokens, settings)) is not None:
        middleware.append(Middleware(HostMiddleware, hosts=hosts, refusals=refusals))
    if tokens is not None:
        auth = Middleware(
            AuthMiddleware,
            tokens=tokens,
            permitting=api_scopes,
            refusals=refusals,
            max_body_bytes=max_body_bytes,
        )
        middleware.append(auth)
    elif "*" not in settings.cors_origins:
        middleware.append(Middleware(SameOriginMiddleware, cors_origins=settings.cors_origins, refusals=refusals))
    return middleware


def checked_hosts(server: HttpServer, tokens: TokenFile | None, settings: HttpSettings) -> HostCheck | None:
    """Returns what refuses names of other sites on the port of the API; None if it has tokens or TLS."""
    is_open = tokens is None and not server.has_tls
    return host_check(settings.host, settings.cors_origins) if is_open else None


def metrics_middleware(tokens: TokenFile | None, hosts: HostCheck | None) -> list[Middleware]:
    """Returns the middleware of the metrics' port."""
    permitting = None if tokens is None else metrics_scopes(tokens)
    middleware = [] if hosts is None else [Middleware(HostMiddleware, hosts=hosts, permitting=permitting)]
    if tokens is not None and permitting is not None:
        middleware.append(Middleware(AuthMiddleware, tokens=tokens, permitting=permitting))
    return middleware


class AccessLogMiddleware:
    """Writes an entry to the access log when a response has been sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, port = scope["client"] or ("", 0)
        path = scope["raw_path"].decode("latin-1")  # not decoded further: it might hold a line break
        entry = AccessLogEntry(f"{scope['method']} {path}", f"{host}:{port}")
        status = 0

        async def send_and_log(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                entry.principal = scope.get(PRINCIPAL)
                entry.end(status)

        await self._app(scope, receive, send_and_log)


class DrainMiddleware:
    """Closes each connection after its next response while the server drains, so that clients move to another one.

    Once the server stops, it refuses new requests, except for health checks, and those that the grace period cuts off.
    """

    def __init__(self, app: ASGIApp, services: Services, server: HttpServer) -> None:
        self._app = app
        self._health = services.admin.health
        self._refusals = services.inference.refusals
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        if self._server.is_stopping and scope["path"] not in OPEN_PATHS:
            await refuse(shutting_down(), self._refusals, scope, receive, send_and_close)
            return
        try:
            await self._app(scope, receive, send_and_close if self._health.is_draining else send)
        except asyncio.CancelledError:  # uvicorn cancels it when the grace period is over
            with suppress(RuntimeError):  # the response has begun
                await error_response(shutting_down())(scope, receive, send_and_close)


class HostMiddleware:
    """Refuses requests for a name that another site can have, except for health, and unless they need a token.

    Args:
        permitting: as of `AuthMiddleware`; None if no request needs a token.
        refusals: counts the requests that are refused; None to count nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: HostCheck,
        permitting: Callable[[str, str], frozenset[str] | None] | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._permitting = permitting
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        host = Headers(scope=scope).get("host", "")
        needs_token = self._permitting is not None and self._permitting(scope["method"], path) is not None
        if needs_token or path in OPEN_PATHS or not self._hosts.refuses(host):
            await self._app(scope, receive, send)
            return
        error = PermissionDenied(
            f"the host {quote(host)} may be another site's: name it with --cors-origin, or set --token-file"
        )
        await refuse(error, self._refusals, scope, receive, send)


class SameOriginMiddleware:
    """Refuses changes, and requests of the page, that another site's page may have sent through its reader's browser.

    For a server without tokens, which trusts whoever can connect. Pages that `--cors-origin` names are not refused.
    """

    def __init__(self, app: ASGIApp, cors_origins: Sequence[str], refusals: Refusals) -> None:
        self._app = app
        self._allowed = frozenset(cors_origins)
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method == "POST" and (path.startswith(PAGE_API) or api_scopes(method, path) is CHANGES_SERVER):
            origin = self._foreign_origin(Headers(scope=scope))
            if origin is not None:
                error = PermissionDenied(
                    f"pages of {quote(origin)} may not call this: see --cors-origin and --token-file"
                )
                await refuse(error, self._refusals, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _foreign_origin(self, headers: Headers) -> str | None:
        """Returns the origin of a page that is not the server's own and not allowed; None if there is no such page."""
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is None:
            site = headers.get("sec-fetch-site", "none")
            return None if site in ("none", "same-origin") else site
        return None if is_own_page(origin, host) or origin in self._allowed else origin
