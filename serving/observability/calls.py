"""Counts calls of both protocols by method and status, and how long they took.

Only what is rare or slow is counted here: refused inferences, and all other methods. A version's statistics have the
inferences that reach its queue, counted once a batch.
"""

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from serving.errors import ServingError
from serving.observability.statistics import Latencies
from serving.protocol.status import OK, STATUS_NAMES, status_name

P = ParamSpec("P")
T = TypeVar("T")

MODEL_INFER = "ModelInfer"
UNKNOWN = "unknown"
"""Method of requests that match no route, or are not HTTP."""


def method_of_rpc(path: str) -> str:
    """Returns the method under which the calls of an RPC of this server are counted."""
    return path.rpartition("/")[2]


class Calls:
    """Numbers and durations of calls by method, status and model. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[tuple[str, str, str], Latencies] = {}

    def record(self, method: str, status: str, seconds: float = 0.0, model: str = "") -> None:
        """Counts a call.

        Args:
            status: name of a gRPC status code.
            seconds: that it took; 0 for a call that is refused at once.
            model: a name that is in the repository; else empty.
        """
        with self._lock:
            key = method, status, model
            latencies = self._calls.get(key)
            if latencies is None:
                latencies = self._calls[key] = Latencies()
            latencies.add(seconds)

    def counted(self, method: str, handler: Callable[P, T]) -> Callable[P, T]:
        """Wraps a handler, so that its calls are counted."""

        @wraps(handler)
        def handle(*args: P.args, **kwargs: P.kwargs) -> T:
            began, status = time.monotonic(), "INTERNAL"
            try:
                result = handler(*args, **kwargs)
                status = STATUS_NAMES[OK]
                return result
            except ServingError as error:
                status = status_name(error)
                raise
            finally:
                self.record(method, status, time.monotonic() - began)

        return handle

    def snapshot(self) -> dict[tuple[str, str, str], Latencies]:
        """Returns the calls by method, status and model."""
        with self._lock:
            return {key: latencies.copy() for key, latencies in self._calls.items()}
