"""Limits of the front ends, and the file limit of the process, which bounds its connections."""

import resource
import threading
from collections import Counter
from contextlib import suppress

from convoy.open_files import MAX_OPEN_FILES, max_open_files
from serving.errors import ResourceExhausted, ServingError
from serving.observability.refusals import Refusals

MAX_STREAMS = 256
"""Open ModelStreamInfer calls."""
MAX_WATCHES = 256
MAX_WATCHES_PER_HOST = 64
"""Open Watch calls, which need no token: of all clients, and of those on one host."""
MAX_REFLECTIONS = 32
MAX_REFLECTIONS_PER_HOST = 8
"""Open reflection calls."""
MAX_BLOCKING = 16
"""Calls that load or unload models."""

KEEPALIVE_S = 60
"""Seconds without traffic after which the server pings a connection, so that it notices clients that vanished."""
KEEPALIVE_TIMEOUT_S = 20
"""Seconds that a client has to respond to a ping."""

BACKLOG = 4096
"""Connections that may wait to be accepted. The kernel cuts it to net.core.somaxconn."""
_RESERVED_FILES = 256
"""Open files that are left for models, logs and metrics."""


def raise_file_limit() -> int:
    """Raises the soft limit of open files to the hard one: each connection takes a file.

    Service managers start processes with a soft limit of 1,024 and expect them to raise it
    (https://0pointer.net/blog/file-descriptor-limits.html).

    Returns:
        The new limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft if soft != resource.RLIM_INFINITY else MAX_OPEN_FILES
    with suppress(OSError, ValueError):  # a system may accept less than its hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def max_connections() -> int:
    """Returns how many connections one front end may hold: half of the open files that the process may have."""
    return max(1, (max_open_files() - _RESERVED_FILES) // 2)


def too_many_changes() -> ResourceExhausted:
    """Returns the error for a load or unload beyond `MAX_BLOCKING`."""
    return ResourceExhausted(f"{MAX_BLOCKING} models are being loaded or unloaded already: retry later", 1000)


class OpenCalls:
    """Bounds the open calls of one method, in total and for each host that makes them. Thread-safe.

    Args:
        refusals: counts the calls that are refused.
        per_host: None for no limit. Calls over Unix sockets have no host; only the total bounds them.
    """

    def __init__(self, method: str, refusals: Refusals, total: int, per_host: int | None = None) -> None:
        self._method = method
        self._refusals = refusals
        self._total = total
        self._per_host = per_host
        self._lock = threading.Lock()
        self._hosts: Counter[str] = Counter()

    def open(self, peer: str) -> None:
        """Counts a call.

        Args:
            peer: address of the client as gRPC writes it: `ipv4:HOST:PORT`, `ipv6:[HOST]:PORT` or `unix:…`.

        Raises:
            ResourceExhausted: there are too many.
        """
        host = _host(peer)
        with self._lock:
            if self._hosts.total() >= self._total:
                limit = f"{self._total} {self._method} calls at a time"
            elif host and self._per_host is not None and self._hosts[host] >= self._per_host:
                limit = f"{self._per_host} {self._method} calls of one host"
            else:
                self._hosts[host] += 1
                return
        error = ResourceExhausted(f"this server serves at most {limit}")
        self.count_refused(error)
        raise error

    def count_refused(self, error: ServingError) -> None:
        """Counts a call that is refused with this error."""
        self._refusals.count_error(error, method=self._method)

    def close(self, peer: str) -> None:
        """Counts a call that has ended."""
        host = _host(peer)
        with self._lock:
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]


def _host(peer: str) -> str:
    """Returns the host in a client's address; an empty string for a Unix socket."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else ""
