"""One port: uvicorn on an event loop in a thread of its own.

httptools parses requests and uvloop runs the event loop; where uvloop is not installed, asyncio's own loop does.
"""

import asyncio
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial

from starlette.types import ASGIApp

from convoy.http_server import Server, open_listener
from convoy.open_files import Reserve
from serving.errors import StartupError
from serving.frontends.http import connections
from serving.frontends.http.connections import Connections
from serving.frontends.http.executor import BoundedExecutor
from serving.frontends.http.fast_path import FastPath
from serving.frontends.http.protocol import BoundedHttpProtocol
from serving.observability.refusals import Refusals

logger = logging.getLogger(__name__)

_POLL_S = 0.005


class HttpServer:
    """A server on one port.

    Args:
        name: of its thread.
        build_app: creates the application, on the running event loop.
        max_connections: beyond it, connections that wait for their clients are closed.

    Attributes:
        port: that it listens on, once `listen` has returned.
        has_tls: once it has started.
        is_stopping: whether new requests should be refused.
        fast_path: of inferences that repeat; `build_app` may set it.
    """

    def __init__(
        self,
        name: str,
        build_app: "Callable[[HttpServer], ASGIApp]",
        *,
        max_connections: Callable[[], int],
        refusals: Refusals,
    ) -> None:
        self.port = 0
        self.has_tls = False
        self.is_stopping = False
        self.fast_path: FastPath | None = None
        self._name = name
        self._build_app = build_app
        self._max_connections = max_connections
        self._refusals = refusals
        self._server: Server | None = None
        self._executors: list[BoundedExecutor] = []
        self._is_up = threading.Event()

    def executor(self, name: str, what: str, *, num_threads: int, max_pending: int) -> BoundedExecutor:
        """Returns an executor that ends with the server."""
        self._executors.append(BoundedExecutor(name, what, num_threads=num_threads, max_pending=max_pending))
        return self._executors[-1]

    def listen(self, host: str, port: int, *, reuse_port: bool = False) -> None:
        """Opens the port; with `reuse_port`, beside other processes that listen on it.

        Raises:
            StartupError: it is not available.
        """
        self._listener = _listen(host, port, reuse_port)
        self.port = self._listener.getsockname()[1]

    def close(self) -> None:
        """Closes the port of a server that has not started."""
        self._listener.close()

    def start(self, context: ssl.SSLContext | None = None) -> None:
        """Starts to serve."""
        self.has_tls = context is not None
        self._thread = threading.Thread(target=self._run, args=(context,), name=self._name, daemon=True)
        self._thread.start()
        self._is_up.wait()
        if self._server is None or not self._server.started:
            raise RuntimeError("the HTTP server did not start")  # the thread's own traceback says why

    def stop(self, grace_s: float, linger_s: float = 0.0) -> None:
        """Refuses new requests, finishes those in flight within `grace_s`, then closes all connections.

        Args:
            linger_s: how long to accept connections and answer that the server stops, before it closes the port.
        """
        if self._server is None or not self._thread.is_alive():
            return
        self.is_stopping = True
        time.sleep(linger_s)
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        self._thread.join()
        for executor in self._executors:
            executor.close()

    def _run(self, context: ssl.SSLContext | None) -> None:
        try:
            with asyncio.Runner(loop_factory=_new_event_loop) as runner:
                runner.run(self._serve(context))
        finally:
            self._is_up.set()

    async def _serve(self, context: ssl.SSLContext | None) -> None:
        reserve = Reserve()
        peers = Connections(self._max_connections(), reserve)
        app = self._build_app(self)
        protocol = partial(BoundedHttpProtocol, peers=peers, refusals=self._refusals, fast_path=self.fast_path)
        self._server = Server(
            app,
            context,
            reserve=reserve,
            make_room=peers.make_room,
            http=protocol,
            timeout_keep_alive=math.ceil(connections.KEEP_ALIVE_S),
        )
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            await asyncio.sleep(_POLL_S)
        self._is_up.set()
        sweeping = asyncio.create_task(_sweep(peers))
        await serving
        sweeping.cancel()
        if peers.expire():
            await asyncio.sleep(0)  # the responses are written
        peers.abort()  # those that linger: uvloop does not close while they are open
        await asyncio.sleep(0)


async def _sweep(peers: Connections) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(connections.SWEEP_S)
        try:
            peers.sweep(loop.time())
        except Exception:  # a defect must not end the time limits of all connections
            logger.exception("the time limits of connections could not be checked")


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _listen(host: str, port: int, reuse_port: bool) -> socket.socket:
    try:
        return open_listener(host, port, reuse_port=reuse_port)
    except OSError as error:
        raise StartupError(str(error)) from error
