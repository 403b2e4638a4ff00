"""Finds batches that take too long: a backend that hangs must hold neither its requests nor the changes of models."""

import threading
import time
from collections.abc import Callable, Sequence

from serving.inference.batch import QueuedRequest
from serving.inference.instance import Instance

_MAX_PAUSE_S = 5.0


class Watchdog:
    """A thread that checks the instances of one model version at least every 5 seconds.

    Args:
        limit_s: how long one batch may be computed.
        lock: held while an overdue batch is claimed and its instance marked as hung.
        on_hung: called without the lock, with the instance and the batch's unanswered requests.
    """

    def __init__(
        self,
        name: str,
        instances: Sequence[Instance],
        limit_s: float,
        lock: threading.Lock,
        on_hung: Callable[[Instance, Sequence[QueuedRequest]], None],
    ) -> None:
        self._instances = instances
        self._limit_s = limit_s
        self._lock = lock
        self._on_hung = on_hung
        self._stopping = threading.Event()
        threading.Thread(target=self._work, name=f"{name}-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread soon."""
        self._stopping.set()

    def _work(self) -> None:
        while not self._stopping.wait(min(_MAX_PAUSE_S, self._limit_s / 8)):
            for instance in self._instances:
                requests = self._claim_overdue(instance)
                if requests is not None:
                    self._on_hung(instance, requests)

    def _claim_overdue(self, instance: Instance) -> Sequence[QueuedRequest] | None:
        """Returns the unanswered requests of a batch that is overdue; None if there is no such batch."""
        attempt = instance.attempt
        if attempt is None or time.monotonic_ns() - attempt.began_ns < self._limit_s * 1e9:
            return None
        with self._lock:
            if not attempt.claim():
                return None
            instance.is_hung = True
            return attempt.requests
