"""The open connections of one port: how many there may be, and how long a client may take.

A sweep once a second looks at all of them, which costs less than a timer for each: 10,000 take 3 ms.
"""

import asyncio
import heapq
from typing import Protocol

from convoy.open_files import Reserve, max_open_files

FIRST_BYTE_S = 30.0
"""How long a new connection may stay silent."""
KEEP_ALIVE_S = 75.0
"""How long a connection may stay idle after a response: longer than clients keep theirs."""
HEAD_S = 30.0
"""How long the head of a request may take, from its first byte."""
REQUEST_S = 3600.0
"""How long the whole request may take, head and body."""
WINDOW_S = 30.0
MIN_WINDOW_BYTES = 30 << 10
"""What must move in each `WINDOW_S`, of a request's body or of a response: 1 KiB/s, the rate of GPRS."""
SWEEP_S = 1.0
GOODBYE_S = 0.25
"""How long a stopping server waits for a request that is on its way, and for a TLS client to close."""

MAX_CONNECTIONS = 10_000
METRICS_CONNECTIONS = 64
"""Of the metrics port. Prometheus and the probes need one each."""


def max_connections() -> int:
    """Returns how many connections the API may hold: half of the files that the process may open.

    The other half is for gRPC, the metrics and the models.
    """
    return min(MAX_CONNECTIONS, max_open_files() // 2)


class Connection(Protocol):
    """A connection, as `Connections` sees it."""

    waits_since: float
    """When it began to wait for its client, on the clock of the event loop."""

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for its client: no request is being processed."""

    def check(self, now: float) -> None:
        """Closes the connection if its client is too slow."""

    def expire(self) -> bool:
        """Answers a request that the grace period cuts off, if no task does. Returns whether there was one."""

    def abort(self) -> None:
        """Closes the connection at once."""


class Connections:
    """The open connections of one port. Not thread-safe: used by the port's event loop only.

    Args:
        limit: the largest number of connections.
        reserve: descriptors for further connections; is refilled when one has been closed.
    """

    def __init__(self, limit: int, reserve: Reserve) -> None:
        self.limit = limit
        self._reserve = reserve
        self._open: set[Connection] = set()

    def __contains__(self, connection: object) -> bool:
        return connection in self._open

    def add(self, connection: Connection) -> bool:
        """Adds a connection. At the limit, it closes those that have waited longest for their clients.

        Returns:
            False if all others are busy: the caller should refuse the connection.
        """
        if len(self._open) >= self.limit:
            self.make_room()
        if len(self._open) >= self.limit:
            return False
        self._open.add(connection)
        return True

    def discard(self, connection: Connection) -> None:
        """Forgets a connection that is about to be closed."""
        self._open.discard(connection)
        if self._reserve.is_short:
            asyncio.get_running_loop().call_soon(self._reserve.refill)

    def expire(self) -> bool:
        """Answers the requests that the grace period cuts off. Returns whether there were any."""
        expired = [connection.expire() for connection in list(self._open)]
        return any(expired)

    def abort(self) -> None:
        """Closes all connections at once."""
        for connection in list(self._open):
            connection.abort()

    def sweep(self, now: float) -> None:
        """Closes the connections whose clients are too slow."""
        for connection in list(self._open):
            connection.check(now)

    def make_room(self) -> None:
        """Closes those that have waited longest for their clients."""
        waiting = [connection for connection in self._open if connection.is_waiting]
        # Several at once, so that a flood of connections does not search all of them for each.
        for connection in heapq.nsmallest(max(1, self.limit // 16), waiting, key=lambda each: each.waits_since):
            self._open.discard(connection)
            connection.abort()


class RateWindow:
    """Whether a transfer moves at least `MIN_WINDOW_BYTES` in each `WINDOW_S`."""

    __slots__ = ("_moved", "_since")

    def __init__(self) -> None:
        self._since = self._moved = 0.0

    def start(self, now: float, moved: int) -> None:
        """Starts to measure.

        Args:
            moved: bytes so far, from any starting point.
        """
        self._since, self._moved = now, moved

    def is_too_slow(self, now: float, moved: int) -> bool:
        """Returns whether a window has ended in which too little moved. Call it about once a second."""
        if now - self._since < WINDOW_S:
            return False
        is_slow = moved - self._moved < MIN_WINDOW_BYTES
        self.start(now, moved)
        return is_slow
