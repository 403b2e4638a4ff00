"""Answers calls, on the thread that received them or, for those that take seconds, on one of a few others."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from serving.errors import Internal, ServingError
from serving.frontends.common import limits
from serving.inference.request import ResponseSink
from serving.models.changes import Caller

logger = logging.getLogger(__name__)


def respond(sink: ResponseSink[bytes], path: str, handler: Callable[[], bytes]) -> None:
    """Answers a call with what its handler returns or raises."""
    try:
        sink.succeed(handler())
    except ServingError as error:
        sink.fail(error)
    except Exception:
        sink.fail(log_failure(path))


def log_failure(path: str) -> Internal:
    """Logs the exception that is being handled. Returns the error for the client."""
    logger.exception("%s failed", path)
    return Internal("the server failed; its log says why")


class ChangeThreads:
    """Loads and unloads models on threads of their own.

    Args:
        handlers: by method path.
    """

    def __init__(self, handlers: Mapping[str, Callable[[bytes, Caller], bytes]]) -> None:
        self._handlers = handlers
        self._free = threading.BoundedSemaphore(limits.MAX_BLOCKING)
        self._threads = ThreadPoolExecutor(limits.MAX_BLOCKING, thread_name_prefix="changes")

    def start(self, sink: ResponseSink[bytes], path: str, payload: bytes, caller: Caller) -> None:
        """Starts a change, which is not made if its caller has gone when it is its turn.

        Raises:
            ResourceExhausted: too many run or wait.
        """
        if not self._free.acquire(blocking=False):
            raise limits.too_many_changes()
        handler = self._handlers[path]
        change = self._threads.submit(respond, sink, path, lambda: handler(payload, caller))
        change.add_done_callback(lambda _: self._free.release())

    def close(self) -> None:
        """Starts no further change. Those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
