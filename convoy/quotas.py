"""Limits of how much a caller may send in a second. Knows neither callers nor protocols."""

import threading
import time
from collections.abc import Callable

BURST_S = 1.0
"""Seconds of its rate that a caller may use at once, after a pause of as long."""


class Quota:
    """A token bucket of requests and one of bytes (https://en.wikipedia.org/wiki/Token_bucket). Thread-safe.

    A request is admitted while neither bucket is empty, and may leave a debt: a message larger than the bucket is
    admitted, and the next one waits until the debt is paid. Over a long time the rates hold.

    Args:
        requests_per_second: None for no limit.
        bytes_per_second: None for no limit.
        clock: in seconds; never goes back.
    """

    __slots__ = ("_bytes_at", "_clock", "_lock", "_requests_at", "_s_per_byte", "_s_per_request")

    def __init__(
        self,
        requests_per_second: float | None,
        bytes_per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._s_per_request = 1 / requests_per_second if requests_per_second else 0.0
        self._s_per_byte = 1 / bytes_per_second if bytes_per_second else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        # Each bucket as the time at which it is, or was, empty (as in the generic cell rate algorithm, ITU-T I.371).
        self._requests_at = self._bytes_at = clock() - BURST_S

    def take(self, num_bytes: int) -> float:
        """Takes one request of so many bytes.

        Returns:
            0 if the request is admitted; else the seconds after which one would be.
        """
        now = self._clock()
        full = now - BURST_S
        with self._lock:
            requests_at, bytes_at = self._requests_at, self._bytes_at
            if requests_at > now or bytes_at > now:
                return max(requests_at, bytes_at) - now
            self._requests_at = (requests_at if requests_at > full else full) + self._s_per_request
            self._bytes_at = (bytes_at if bytes_at > full else full) + num_bytes * self._s_per_byte
        return 0.0

    def take_more(self, num_bytes: int) -> None:
        """Takes bytes of an admitted request whose number was not known before."""
        with self._lock:
            self._bytes_at = max(self._bytes_at, self._clock() - BURST_S) + num_bytes * self._s_per_byte
