"""The HTTP listeners: uvicorn on an event loop in a thread of its own, one server for the API, one for the metrics."""

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
from serving.frontends.http.app import build_app, build_metrics_app
from serving.inference.service import Service
from serving.observability.logging import AccessLog
from serving.observability.metrics import CONTENT_TYPE, Metrics

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""How long an idle connection stays: longer than clients keep theirs, so that none sends into one just closed."""

_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAddress:
    """Where to listen; port 0 takes any that is free."""

    host: str
    port: int
    metrics_port: int


class HttpFrontend:
    """The API on `port`, `/metrics` and health on `metrics_port`: the numbers are known once started.

    Args:
        max_message_bytes: largest request body.
        token: what callers of the API must show but for health; None for no check.
        tls: certificates for the API. The metrics have neither token nor TLS: their port is for the inside.
        access_log: told of each request to the API when it is over.
    """

    def __init__(
        self,
        service: Service,
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
            build_app, service, max_body_bytes=max_message_bytes, token=token, access_log=access_log
        )
        self._build_metrics = partial(build_metrics_app, service, Metrics(service.repository).render, CONTENT_TYPE)
        self._servers: list[uvicorn.Server] = []
        self._is_up = threading.Event()

    def start(self) -> None:
        """Listen.

        Raises:
            StartupError: a port cannot be had.
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
        """Refuse what comes, finish what is under way, at most for so long, then close."""
        for server in self._servers:
            server.config.timeout_graceful_shutdown = math.ceil(grace_s)
            server.should_exit = True
        self._thread.join()

    def _run(self, api: socket.socket, metrics: socket.socket, context: ssl.SSLContext | None) -> None:
        try:
            with asyncio.Runner() as runner:
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


def _build_server(app: ASGIApp, context: ssl.SSLContext | None) -> uvicorn.Server:
    """uvicorn without its own log set-up and access log. It takes no signals outside the main thread."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
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
    # Connections inherit it. asyncio would set it only on sockets made with proto=IPPROTO_TCP, and without it the two
    # writes of each answer, head and body, are 40 ms apart.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
