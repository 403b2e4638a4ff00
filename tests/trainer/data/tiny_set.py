"""A tiny published set, and a web server with the faults of real ones, for the tests of this folder."""

import gzip
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

from trainer.data.published.collect import KnownFile
from trainer.data.published.download import Limits
from trainer.data.published.formats import decode_idx
from trainer.data.published.sources import Form, HandPlaced, Mirror, NamedSet, Source
from trainer.data.store import Content, ImageSet, content_digest

QUICK = Limits(connect_s=1.0, grace_s=0.05, window_s=0.15, floor_bytes_per_s=100_000, num_resumes=2)
"""Limits for tests: fractions of a second where users get seconds."""
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
GZ_NAMES = tuple(f"{name}.gz" for name in NAMES)


def make_content(side: int = 8, num_train: int = 40, num_test: int = 20, seed: int = 0) -> Content:
    """Random images of two classes."""
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        ImageSet(
            torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=generator),
            torch.arange(count) % 2,
        )
        for count in (num_train, num_test)
    )
    return Content("tiny", ("even", "odd"), train, test)


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    shape = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + array.astype(np.uint8).tobytes()


def idx_files(content: Content) -> dict[str, bytes]:
    """The four files of a set, by name."""
    arrays = []
    for part in (content.train, content.test):
        arrays += [part.images[:, 0].numpy(), part.labels.numpy()]
    return {name: idx_bytes(array) for name, array in zip(NAMES, arrays, strict=True)}


def make_named_set(*sources: Source, content: Content | None = None) -> NamedSet:
    """A set like MNIST in all but size."""
    content = content or make_content()
    files = tuple(
        KnownFile(name, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
        for name, data in idx_files(content).items()
    )
    _, channels, height, width = content.train.images.shape
    return NamedSet(
        name="tiny",
        classes=content.classes,
        image_shape=(channels, height, width),
        num_train=len(content.train),
        num_test=len(content.test),
        sha256=content_digest(content),
        forms=(Form(files, decode_idx),),
        sources=(HandPlaced(("tiny", "Tiny/raw")), *sources),
    )


Answer = Callable[[BaseHTTPRequestHandler], None]


class FaultyServer:
    """Answers a path with whatever function is put in `routes`, and counts requests."""

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str | None] = []
        self.released = threading.Event()
        """Set at the end: whatever hangs on purpose hangs on this."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def put_files(self, files: dict[str, bytes]) -> None:
        """Serves files well, gzipped."""
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
                server.ranges.append(self.headers.get("Range"))
                answer = server.routes.get(self.path)
                if answer is None:
                    self.send_error(404)
                    return
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has given up, as it should
                    answer(self)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        return Handler


def begin(handler: BaseHTTPRequestHandler, length: int | None, status: int = 200, **headers: str) -> None:
    """Status line and headers."""
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def whole(data: bytes) -> Answer:
    """The file, as it should be."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        handler.wfile.write(data)

    return answer


def unmeasured(data: bytes) -> Answer:
    """The file, without a promise of its length."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, None)
        handler.wfile.write(data)

    return answer


def resumable(data: bytes, piece_bytes: int) -> Answer:
    """Understands Range, and hangs up after each piece."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            place = f"bytes {start}-{len(data) - 1}/{len(data)}"
            begin(handler, len(data) - start, 206, Content_Range=place, ETag='"1"')
        else:
            begin(handler, len(data), ETag='"1"')
        handler.wfile.write(data[start : start + piece_bytes])

    return answer


def cut_once(data: bytes, num_bytes: int) -> Answer:
    """Hangs up in the middle of the first answer; ignores Range."""
    answered: list[bool] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        handler.wfile.write(data if answered else data[:num_bytes])
        answered.append(True)

    return answer


def stalled(data: bytes, num_bytes: int, released: threading.Event, reached: threading.Event) -> Answer:
    """Stops in the middle without hanging up."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        handler.wfile.write(data[:num_bytes])
        handler.wfile.flush()
        reached.set()
        released.wait(30)

    return answer


def slow(data: bytes, piece_bytes: int, released: threading.Event) -> Answer:
    """A piece every 10 ms."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, len(data))
        for start in range(0, len(data), piece_bytes):
            handler.wfile.write(data[start : start + piece_bytes])
            released.wait(0.01)

    return answer
