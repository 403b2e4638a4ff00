"""The port of the REST API: uvicorn on the event loop that gRPC uses too."""

import asyncio
import logging
import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from convoy.http_server import Server, open_listener
from trainer.errors import ConfigError

KEEP_ALIVE_S = 75
HEAD_S = 30.0
"""How long a new connection may take until the head of its first request is complete."""
MAX_HEAD_BYTES = 32 * 1024
MAX_CONNECTIONS = 1000
"""Beyond it, requests are answered with 503; each watcher has a connection."""
_POLL_S = 0.005
_GONE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
"""A client whose host is gone without a word is noticed after 90 s, also by a stream that has nothing to say."""
for _name, _value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
    if hasattr(socket, _name):  # macOS has others
        _GONE.append((socket.IPPROTO_TCP, getattr(socket, _name), _value))


class RestServer:
    """A server on one port.

    Args:
        port: 0 for any that is free.
        context: of TLS; None for plain text.

    Attributes:
        port: that it listens on.

    Raises:
        ConfigError: the port is not available.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, context: ssl.SSLContext | None) -> None:
        try:
            self._listener = open_listener(host, port)
        except OSError as error:
            raise ConfigError(str(error)) from error
        for level, option, value in _GONE:  # connections have what their listener has
            self._listener.setsockopt(level, option, value)
        self.port: int = self._listener.getsockname()[1]
        self._server = _Server(
            app,
            context,
            http=_Protocol,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,  # of a request's head, which only h11 limits
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        # uvicorn warns of each request that is no HTTP: anybody who reaches the port could fill the disk.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(_POLL_S)

    async def stop(self, grace_s: float) -> None:
        """Finishes requests within that time, then closes all connections."""
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        await self._serving


class _Protocol(H11Protocol):
    """A connection, which is closed if its client does not send a request: uvicorn would keep it for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEAD_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Server(Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the service, which stops this server."""
        yield
