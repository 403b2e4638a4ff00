"""Downloads over HTTP that give up soon: on a host that does not answer, a trickle, a cut-off that cannot be
resumed, and an answer that is not the file. Knows nothing of data sets; what arrives is verified elsewhere,
by digest.
"""

import http.client
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.published.collect import SourceError

DownloadProgress = Callable[[str, int, int | None], None]
"""Takes a file's name, the bytes that have arrived and, where known, the bytes in all."""

_CHUNK_BYTES = 1 << 16


class TooSlow(SourceError):
    """The source delivers, but below the floor: worth coming back to when no other has the file."""


class _CutOff(Exception):
    """The connection ended before the file did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to give up on a server."""

    connect_s: float = 5.0
    """For name resolution and connecting, together; and then again for each silence."""
    grace_s: float = 2.0
    """Before the first look at the rate: connections start slowly."""
    window_s: float = 5.0
    """Over which the rate is taken."""
    floor_bytes_per_s: float = 200_000
    """Below this the next source is tried."""
    num_resumes: int = 2
    """How often a cut-off download is taken up again."""


def download(url: str, target: Path, *, max_bytes: int, limits: Limits, progress: DownloadProgress) -> None:
    """Fetches `url` into the new file `target`.

    Raises SourceError with the reason when it cannot be had whole, TooSlow when it comes below the floor.
    """
    with target.open("xb") as file:
        transfer = _Transfer(url, file, max_bytes, limits, progress)
        for _ in range(1 + limits.num_resumes):
            try:
                transfer.run()
                return
            except _CutOff:
                continue
    raise SourceError(f"cut off {1 + limits.num_resumes} times, last at {transfer.num_bytes} bytes")


class _Transfer:
    """One file on its way, over one connection or several."""

    def __init__(self, url: str, file: BinaryIO, max_bytes: int, limits: Limits, progress: DownloadProgress) -> None:
        self.url = url
        self.file = file
        self.max_bytes = max_bytes
        self.limits = limits
        self.progress = progress
        self.num_bytes = 0
        self.validator: str | None = None

    def run(self) -> None:
        """Opens a connection and reads to the end, from where the last stopped if the server allows it."""
        with self._open() as response:
            _refuse_pages(response)
            self._rewind_unless_resumed(response)
            remaining = response.headers.get("Content-Length")
            total = self.num_bytes + int(remaining) if remaining and remaining.isdigit() else None
            if total is not None and total > self.max_bytes:
                raise SourceError(f"offers {total} bytes, more than the file has")
            self.validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
            self._read(response, total)

    def _open(self) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url, headers={"User-Agent": "convoy", "Accept-Encoding": "identity"})
        if self.num_bytes:
            request.add_header("Range", f"bytes={self.num_bytes}-")
            if self.validator is not None:
                request.add_header("If-Range", self.validator)
        try:
            response: http.client.HTTPResponse = _opener().open(request, timeout=self.limits.connect_s)
        except urllib.error.HTTPError as error:
            error.close()
            raise SourceError(f"answered {error.code} {error.reason}") from error
        except TimeoutError as error:
            raise SourceError("did not answer in time") from error
        except (OSError, http.client.HTTPException) as error:
            raise SourceError(_reason(error)) from error
        return response

    def _rewind_unless_resumed(self, response: http.client.HTTPResponse) -> None:
        resumed = response.status == 206
        content_range = response.headers.get("Content-Range", "")
        if resumed and not content_range.startswith(f"bytes {self.num_bytes}-"):
            raise SourceError(f"resumed at the wrong place ({content_range or 'not said where'})")
        if not resumed:
            self.file.seek(0)
            self.file.truncate()
            self.num_bytes = 0

    def _read(self, response: http.client.HTTPResponse, total: int | None) -> None:
        pace = _Pace(self.limits)
        while chunk := _next_chunk(response):
            if self.num_bytes == 0 and chunk.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
                raise SourceError("answered with a web page instead of the file")
            self.num_bytes += len(chunk)
            if self.num_bytes > self.max_bytes:
                raise SourceError(f"sends more than the {self.max_bytes} bytes that the file has")
            self.file.write(chunk)
            pace.add(len(chunk))
            self.progress(self.url.rpartition("/")[2], self.num_bytes, total)
        if total is not None and self.num_bytes < total:
            raise _CutOff


class _Pace:
    """Watches the rate, window after window."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.since = time.monotonic() + limits.grace_s
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Notes bytes; raises TooSlow at the end of a window that had too few."""
        self.num_bytes += num_bytes
        seconds = time.monotonic() - self.since
        if seconds < self.limits.window_s:
            return
        rate = self.num_bytes / seconds
        if rate < self.limits.floor_bytes_per_s:
            raise TooSlow(f"too slow ({rate / 1000:.0f} kB/s)")
        self.since, self.num_bytes = time.monotonic(), 0


def connect_within(address: tuple[str, int], timeout_s: float, _source: object = None) -> socket.socket:
    """Resolves and connects within `timeout_s` in all, shared out among the addresses still to try.

    `socket.create_connection` grants its time-out to each address anew and none to the resolver. Raises
    OSError.
    """
    deadline = time.monotonic() + timeout_s
    addresses = _resolve(address, timeout_s)
    for index, (family, kind, protocol, _, place) in enumerate(addresses):
        connection = socket.socket(family, kind, protocol)
        try:
            share = (deadline - time.monotonic()) / (len(addresses) - index)
            connection.settimeout(max(share, 0.01))
            connection.connect(place)
            connection.settimeout(timeout_s)
            return connection
        except OSError as error:
            connection.close()
            last_error = error
    raise last_error


def _resolve(address: tuple[str, int], timeout_s: float) -> list[Any]:
    """getaddrinfo in a thread: it knows no time-out, and a dead name server holds it for half a minute."""
    answer: queue.Queue[list[Any] | OSError] = queue.Queue(maxsize=1)

    def resolve() -> None:
        try:
            answer.put(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        except OSError as error:
            answer.put(error)

    threading.Thread(target=resolve, name="resolve", daemon=True).start()
    try:
        addresses = answer.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError("the name server does not answer") from None
    if isinstance(addresses, OSError):
        raise addresses
    return addresses


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = connect_within


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = connect_within


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Handler, _SecureHandler)  # which also knows proxies and redirections


def _next_chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)
    except TimeoutError as error:
        raise SourceError("stalled") from error
    except (OSError, http.client.HTTPException) as error:
        raise _CutOff from error


def _refuse_pages(response: http.client.HTTPResponse) -> None:
    if response.headers.get_content_type() == "text/html":
        raise SourceError("answered with a web page instead of the file")


def _reason(error: OSError | http.client.HTTPException) -> str:
    """The cause in a few words: urllib wraps it once or twice."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "did not answer in time"
    if isinstance(cause, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(cause, OSError) and cause.strerror:
        return f"cannot be reached ({cause.strerror})"
    return f"cannot be reached ({cause})"
