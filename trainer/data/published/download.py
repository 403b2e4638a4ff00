"""Downloads a file over HTTP, and gives up on a bad server within seconds.

pooch writes to a temporary file, renames it when it is complete, and retries a download that was cut off. This module
opens the connection and watches what arrives: the time until the server answers, the throughput and the size. It knows
nothing of data sets.
"""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.published.errors import SourceError, TooSlowError

if TYPE_CHECKING:
    from requests import Response

DownloadProgress = Callable[[str, int, int | None], None]
"""Receives a file's name, the bytes that have arrived and the bytes in all, None where the server does not tell."""

_CHUNK_BYTES = 1 << 16
_HEADERS = {"User-Agent": "convoy", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadLimits:
    """Limits beyond which a download gives up on a server."""

    connect_s: float = 5.0
    """Longest time until a server answers: name resolution, connection, redirects and headers together. Also the
    longest silence afterwards."""
    grace_s: float = 2.0
    """Time before throughput is measured: connections start slowly."""
    window_s: float = 5.0
    """Time over which throughput is measured."""
    min_bytes_per_s: float = 200_000
    """Floor on throughput."""
    num_retries: int = 2
    """Further attempts at a download that was cut off. Each starts at the first byte."""


def download(
    url: str,
    target: Path,
    *,
    max_bytes: int,
    limits: DownloadLimits,
    progress: DownloadProgress,
    sha256_prefix: str = "",
) -> None:
    """Downloads `url` to the new file `target`, which appears when it is complete.

    Args:
        url: an HTTP or HTTPS address; proxies are those of the environment.
        target: a file in an existing folder.
        max_bytes: largest size that the file can have.
        limits: beyond which the download fails.
        progress: receives the progress.
        sha256_prefix: first hexadecimal digits of the file's SHA-256, where known.

    Raises:
        TooSlowError: the throughput is below the floor.
        SourceError: the file cannot be downloaded for another reason, which the message gives.
        OSError: the file cannot be written.
    """
    import pooch  # type: ignore[import-untyped]
    import requests

    pooch.get_logger().setLevel("ERROR")  # else it prints a line for each file and each retry
    attempt = _Attempt(max_bytes, limits, progress, sha256_prefix)
    files = pooch.create(
        target.parent, "", registry={target.name: None}, urls={target.name: url}, retry_if_failed=limits.num_retries
    )
    try:
        files.fetch(target.name, downloader=attempt)
    except requests.ConnectionError as error:
        raise SourceError(f"cut off {1 + limits.num_retries} times, last at {attempt.num_bytes} bytes") from error


class _Attempt:
    """A pooch downloader: one attempt each time that pooch calls it."""

    def __init__(self, max_bytes: int, limits: DownloadLimits, progress: DownloadProgress, sha256_prefix: str) -> None:
        self.max_bytes = max_bytes
        self.limits = limits
        self.progress = progress
        self.sha256_prefix = sha256_prefix
        self.num_bytes = 0

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        Path(output_file).unlink()  # pooch's is for this user alone; ours has the mode that the umask gives
        with _open(url, self.limits) as response, open(output_file, "xb") as file:
            total = self._check_headers(response)
            digest, throughput = hashlib.sha256(), _ThroughputFloor(self.limits)
            self.num_bytes = 0
            for chunk in _chunks(response):
                if self.num_bytes == 0 and chunk.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
                    raise SourceError("answered with a web page instead of the file")
                self.num_bytes += len(chunk)
                if self.num_bytes > self.max_bytes:
                    raise SourceError(f"sends more than the {self.max_bytes} bytes that the file has")
                file.write(chunk)
                digest.update(chunk)
                throughput.add(len(chunk))
                self.progress(url.rpartition("/")[2], self.num_bytes, total)
        if not digest.hexdigest().startswith(self.sha256_prefix):
            found = digest.hexdigest()[: len(self.sha256_prefix)]
            raise SourceError(f"sent another file (sha256 {found}, not {self.sha256_prefix})")

    def _check_headers(self, response: "Response") -> int | None:
        """Returns the size that the server promises, None where it promises none."""
        if response.status_code != 200:
            raise SourceError(f"answered {response.status_code} {response.reason}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise SourceError("answered with a web page instead of the file")
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        if total is not None and total > self.max_bytes:
            raise SourceError(f"offers {total} bytes, more than the file has")
        return total


class _ThroughputFloor:
    """Measures throughput, window after window."""

    def __init__(self, limits: DownloadLimits) -> None:
        self.limits = limits
        self.since = time.monotonic() + limits.grace_s
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Counts bytes; raises TooSlowError at the end of a window below the floor."""
        self.num_bytes += num_bytes
        seconds = time.monotonic() - self.since
        if seconds < self.limits.window_s:
            return
        rate = self.num_bytes / seconds
        if rate < self.limits.min_bytes_per_s:
            raise TooSlowError(f"too slow ({rate / 1000:.0f} kB/s)")
        self.since, self.num_bytes = time.monotonic(), 0


def _open(url: str, limits: DownloadLimits) -> "Response":
    """Sends the request and returns the response without its body, within `connect_s` in all.

    In a thread, because requests bounds a connection to each address and each read, but neither the name resolution
    (a dead name server blocks it for half a minute) nor their sum.
    """
    import requests

    answer: Future[requests.Response] = Future()

    def ask() -> None:
        try:
            # Half of the time for an address leaves the other half for a second one, as for IPv4 after IPv6.
            timeout = (limits.connect_s / 2, limits.connect_s)
            response = requests.get(url, headers=_HEADERS, stream=True, timeout=timeout)
        except BaseException as error:
            answer.set_exception(error)
        else:
            answer.set_result(response)

    threading.Thread(target=ask, name="download", daemon=True).start()
    try:
        return answer.result(limits.connect_s)
    except (TimeoutError, requests.Timeout):
        answer.add_done_callback(_close)
        raise SourceError("did not answer in time") from None
    except requests.RequestException as error:
        raise SourceError(_describe(error)) from error


def _close(late: "Future[Response]") -> None:
    if late.exception() is None:
        late.result().close()


def _chunks(response: "Response") -> Iterator[bytes]:
    """Yields bytes as they arrive, so that throughput is measured on a trickle too.

    Raises:
        SourceError: nothing has arrived for as long as the request's time-out.
        requests.ConnectionError: The connection ended before the file did; pooch tries again.
    """
    import requests
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    try:
        while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=False):
            yield chunk
    except ReadTimeoutError as error:
        raise SourceError("stalled") from error
    except HTTPError as error:
        raise requests.ConnectionError(error) from error


def _describe(error: BaseException) -> str:
    """Describes the cause in a few words: requests and urllib3 wrap it several times."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    return f"cannot be reached ({getattr(error, 'strerror', None) or error})"
