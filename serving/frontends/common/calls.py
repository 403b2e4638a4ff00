"""Answers calls, on the thread that received them or, for those that take seconds, on one of a few others."""

import logging
import threading
from collections.abc import Callable, Mapping

from convoy.threads import ThreadPool
from serving.errors import Internal, InvalidArgument, ServingError
from serving.frontends.common import limits
from serving.frontends.common.limits import OpenCalls
from serving.inference.request import ResponseSink
from serving.models.changes import Caller
from serving.observability.calls import method_of_rpc
from serving.observability.refusals import Refusals
from serving.protocol.admin import watched_service

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


def watched(payload: bytes, calls: OpenCalls) -> str:
    """Returns the service that a Watch call's message names.

    Args:
        calls: counts the call if it is refused.

    Raises:
        InvalidArgument: the message is malformed, or too long.
    """
    try:
        return watched_service(payload)
    except InvalidArgument as error:
        calls.count_refused(error)
        raise


class ChangeThreads:
    """Loads and unloads models on threads of their own.

    Args:
        handlers: by method path.
        refusals: counts the changes that are refused.
    """

    def __init__(self, handlers: Mapping[str, Callable[[bytes, Caller], bytes]], refusals: Refusals) -> None:
        self._handlers = handlers
        self._refusals = refusals
        self._free = threading.BoundedSemaphore(limits.MAX_BLOCKING)
        self._threads = ThreadPool(limits.MAX_BLOCKING, "changes")

    def start(self, sink: ResponseSink[bytes], path: str, payload: bytes, caller: Caller) -> None:
        """Starts a change, which is not made if its caller has gone when it is its turn.

        Raises:
            ResourceExhausted: too many run or wait.
        """
        if not self._free.acquire(blocking=False):
            error = limits.too_many_changes()
            self._refusals.count_error(error, method=method_of_rpc(path))
            raise error
        handler = self._handlers[path]
        change = self._threads.submit(respond, sink, path, lambda: handler(payload, caller))
        change.add_done_callback(lambda _: self._free.release())

    def close(self) -> None:
        """Starts no further change. Those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
