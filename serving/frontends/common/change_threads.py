"""Threads for the calls that load and unload models, which take seconds."""

import threading
from collections.abc import Callable, Mapping

from convoy.threads import ThreadPool
from serving.errors import ServingError
from serving.frontends.common import limits
from serving.frontends.common.status import log_failure
from serving.inference.request import ResponseSink
from serving.models.changes import Caller
from serving.observability.calls import method_of_rpc
from serving.observability.refusals import Refusals


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
        change = self._threads.submit(self._make, sink, path, payload, caller)
        change.add_done_callback(lambda _: self._free.release())

    def close(self) -> None:
        """Starts no further change. Those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _make(self, sink: ResponseSink[bytes], path: str, payload: bytes, caller: Caller) -> None:
        try:
            sink.succeed(self._handlers[path](payload, caller))
        except ServingError as error:
            sink.fail(error)
        except Exception:
            sink.fail(log_failure(path))
