"""The HTTP servers: uvicorn for the API and for the metrics, on one event loop in a thread of its own.

httptools parses requests and uvloop runs the event loop; where uvloop is not installed, asyncio's own loop does.
"""

import asyncio
import math
import os
import socket
import ssl
import threading
from dataclasses import dataclass
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from convoy.auth import TlsFiles, Token
from serving.errors import StartupError
from serving.frontends.common.services import Services
from serving.frontends.http.app import build_app, build_metrics_app
from serving.frontends.http.protocol import BoundedHttpProtocol
from serving.observability.logging import AccessLog
from serving.observability.metrics import CONTENT_TYPE, Metrics

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than clients keep theirs, so that none uses one that just closed."""

_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAddress:
    """A host and port to listen on. Port 0 takes any free port."""

    host: str
    port: int
    metrics_port: int


class HttpFrontend:
    """A `Frontend` for HTTP: the API on `port`, metrics and health on `metrics_port`. Both are set by `start`.

    Args:
        max_message_bytes: size of the largest request body.
        token: that clients of the API must send, except for health checks; None for no authentication.
        tls: for the API; None for plain text. The metrics have neither token nor TLS: do not expose their port.
        access_log: gets an entry when a request to the API ends.
    """

    def __init__(
        self,
        services: Services,
        address: HttpAddress,
        *,
        max_message_bytes: int,
        token: Token | None = None,
        tls: TlsFiles | None = None,
        access_log: AccessLog | None = None,
    ) -> None:
        self.port = 0
        self.metrics_port = 0
        self._address = address
        self._tls = tls
        self._build_api = partial(
            build_app, services, max_body_bytes=max_message_bytes, token=token, access_log=access_log
        )
        self._build_metrics = partial(
            build_metrics_app, services.admin, Metrics(services.admin.repository).render, CONTENT_TYPE
        )
        self._servers: list[uvicorn.Server] = []
        self._is_up = threading.Event()

    def start(self) -> None:
        """Starts to listen.

        Raises:
            StartupError: a port is not available.
        """
        context = None if self._tls is None else self._tls.server_context()
        api = _listen(self._address.host, self._address.port)
        try:
            metrics = _listen(self._address.host, self._address.metrics_port)
        except StartupError:
            api.close()
            raise
        self.port, self.metrics_port = api.getsockname()[1], metrics.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(api, metrics, context), name="http", daemon=True)
        self._thread.start()
        self._is_up.wait()
        if not self._servers or not all(server.started for server in self._servers):
            raise RuntimeError("the HTTP server did not start")  # the thread's own traceback says why

    def stop(self, grace_s: float) -> None:
        """Refuses new requests, finishes those in flight within `grace_s`, then closes all connections."""
        for server in self._servers:
            server.config.timeout_graceful_shutdown = math.ceil(grace_s)
            server.should_exit = True
        self._thread.join()

    def _run(self, api: socket.socket, metrics: socket.socket, context: ssl.SSLContext | None) -> None:
        try:
            with asyncio.Runner(loop_factory=_new_event_loop) as runner:
                runner.run(self._serve(api, metrics, context))
        finally:
            self._is_up.set()

    async def _serve(self, api: socket.socket, metrics: socket.socket, context: ssl.SSLContext | None) -> None:
        self._servers = [_build_server(self._build_api(), context), _build_server(self._build_metrics(), None)]
        pairs = zip(self._servers, (api, metrics), strict=True)
        tasks = [asyncio.create_task(server.serve(sockets=[listener])) for server, listener in pairs]
        while not all(server.started for server in self._servers):
            await asyncio.sleep(_POLL_S)
        self._is_up.set()
        await asyncio.gather(*tasks)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _build_server(app: ASGIApp, context: ssl.SSLContext | None) -> uvicorn.Server:
    """Returns uvicorn without its own logging. Outside the main thread it installs no signal handlers."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    config.load()
    config.ssl = context
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartupError(f"cannot listen on {host} port {port}: {why}") from error
    # Connections inherit it. uvloop sets it too, asyncio only on sockets made with proto=IPPROTO_TCP. Without it, the
    # two writes of each response, head and body, are 40 ms apart.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
