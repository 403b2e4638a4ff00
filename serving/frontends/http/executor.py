"""Threads for work that would hold up the event loop: large JSON, compressed bodies, loading of models."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from convoy.threads import ThreadPool
from serving.errors import ResourceExhausted

T = TypeVar("T")

MAX_INLINE_BYTES = 64 << 10
"""Of JSON that the event loop itself parses, in about a millisecond."""


class BoundedExecutor:
    """Runs functions on a few threads, and refuses when too many wait. Used by one event loop.

    Args:
        name: of the threads.
        what: that is done, for the error message.
        max_pending: functions that may run or wait at the same time.
    """

    def __init__(self, name: str, what: str, *, num_threads: int, max_pending: int) -> None:
        self._threads = ThreadPool(num_threads, name)
        self._what = what
        self._max_pending = max_pending
        self._free = threading.BoundedSemaphore(max_pending)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Returns what the function returns. If the caller is cancelled before the function starts, it does not run.

        Raises:
            ResourceExhausted: too many functions wait.
        """
        if not self._free.acquire(blocking=False):
            raise ResourceExhausted(f"{self._max_pending} {self._what} already: retry later", retry_after_ms=1000)
        future = self._threads.submit(function, *args)
        future.add_done_callback(lambda _: self._free.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drops the functions that wait. Those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
