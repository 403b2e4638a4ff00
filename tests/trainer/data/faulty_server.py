"""A web server with the faults of real ones."""

import gzip
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.trainer.data.tiny_dataset import GZ_NAMES
from trainer.data.published.sources import Mirror

Answer = Callable[[BaseHTTPRequestHandler], None]


class FaultyServer:
    """Answers each path with the function in `routes`, and counts requests."""

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.requests: Counter[str] = Counter()
        self.released = threading.Event()
        """Set when the server stops; answers that hang wait for it."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def put_files(self, files: dict[str, bytes]) -> None:
        """Serves files compressed and without faults."""
        for name, data in files.items():
            self.routes[f"/{name}.gz"] = whole(gzip.compress(data, mtime=0))

    def mirror(self) -> Mirror:
        return Mirror(self.url, GZ_NAMES)

    @contextmanager
    def running(self) -> Iterator["FaultyServer"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests[self.path] += 1
                answer = server.routes.get(self.path)
                if answer is None:
                    self.send_error(404)
                    return
                with suppress(BrokenPipeError, ConnectionResetError):  # the client gave up, as it should
                    answer(self)

            def log_message(self, *_: object) -> None:
                """Logs nothing."""

        return Handler


def begin(handler: BaseHTTPRequestHandler, length: int | None, status: int = 200, **headers: str) -> None:
    """Sends the status line and the headers."""
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def whole(data: bytes) -> Answer:
    """Sends the file without a fault."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        handler.wfile.write(data)

    return answer


def unmeasured(data: bytes) -> Answer:
    """Sends the file without a Content-Length."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, None)
        handler.wfile.write(data)

    return answer


def cut_once(data: bytes, num_bytes: int) -> Answer:
    """Closes the connection after `num_bytes` of the first answer."""
    answered: list[bool] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        handler.wfile.write(data if answered else data[:num_bytes])
        answered.append(True)

    return answer


def stalled(data: bytes, num_bytes: int, released: threading.Event, reached: threading.Event) -> Answer:
    """Stops after `num_bytes`, but keeps the connection open."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        handler.wfile.write(data[:num_bytes])
        handler.wfile.flush()
        reached.set()
        released.wait(30)

    return answer


def slow(data: bytes, piece_bytes: int, released: threading.Event) -> Answer:
    """Sends a piece every 10 ms."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        for start in range(0, len(data), piece_bytes):
            handler.wfile.write(data[start : start + piece_bytes])
            released.wait(0.01)

    return answer
