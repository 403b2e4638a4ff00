"""Parses large requests on a thread of its own, so that the thread that receives all requests stays free."""

import threading
from collections.abc import Callable

from convoy.threads import ThreadPool
from serving.errors import Cancelled, ResourceExhausted, ServingError
from serving.inference.request import RequestHandle

MAX_WAITING_BYTES = 256 << 20
"""Of the messages that wait to be parsed. One may exceed it, so that every size is accepted."""

_RETRY_AFTER_MS = 1000


class ParserPool:
    """Runs jobs one after the other, within a bound on the size of their messages."""

    def __init__(self) -> None:
        self._executor = ThreadPool(1, "parser")
        self._lock = threading.Lock()
        self._num_bytes = 0

    def submit(
        self, num_bytes: int, parse_and_run: Callable[[], RequestHandle | None], fail: Callable[[ServingError], None]
    ) -> RequestHandle:
        """Queues the job of one request; its handle cancels the job, or what it has started.

        Args:
            fail: is called in place of `parse_and_run` if the request is cancelled before its turn.

        Raises:
            ResourceExhausted: too many bytes wait.
        """
        with self._lock:
            if self._num_bytes > MAX_WAITING_BYTES:
                raise ResourceExhausted(
                    f"{self._num_bytes} bytes of large requests wait to be parsed: send tensors in raw_input_contents",
                    _RETRY_AFTER_MS,
                )
            self._num_bytes += num_bytes
        job = _Job(parse_and_run, fail)
        future = self._executor.submit(job)
        future.add_done_callback(lambda _: self._count_done(num_bytes))
        return job

    def _count_done(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes -= num_bytes


class _Job:
    """A job, and then the request that it has started; a `RequestHandle`."""

    def __init__(self, parse_and_run: Callable[[], RequestHandle | None], fail: Callable[[ServingError], None]) -> None:
        self._parse_and_run = parse_and_run
        self._fail = fail
        self._is_cancelled = False
        self._request: RequestHandle | None = None

    def __call__(self) -> None:
        if self._is_cancelled:
            self._fail(Cancelled("the request was cancelled before it was parsed"))
            return
        self._request = self._parse_and_run()
        if self._is_cancelled:  # `cancel` may have run before `_request` was set
            self.cancel()

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._request is not None:
            self._request.cancel()
