"""Runs the changes of models: one after the other for each model, side by side for different models.

Each change has a thread, so that one that hangs in a backend or on a disk holds up its own model only, and callers wait
no longer than they want to.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.errors import Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable

logger = logging.getLogger(__name__)

MAX_CHANGES = 16
"""Changes of callers that may run or wait at once."""

_MAX_WAIT_S = 600.0
"""How long a caller without a deadline waits."""

LOAD_PATIENCE_S = 60.0
"""After which the others no longer wait for a model that is loading."""

_RETRY_AFTER_MS = 1000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever asked for a change.

    Args:
        deadline: on the clock of `time.monotonic`; None for none.
        is_cancelled: returns whether the caller has gone; called from any thread.
    """

    deadline: float | None = None
    is_cancelled: Callable[[], bool] = lambda: False

    def check(self, name: str) -> None:
        """Checks that the caller still waits for the change of a model.

        Raises:
            Cancelled: the caller has gone.
            DeadlineExceeded: the deadline has passed.
        """
        if self.is_cancelled():
            raise Cancelled(f"the caller has gone: the change of model '{name}' was not started")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded(f"the deadline passed before the change of model '{name}' was started")


ANYONE = Caller()
"""A caller without a deadline that stays."""


class Changes:
    """The changes that run and wait. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, deque[_Change]] = {}
        """The changes that wait, for each model that a change runs of."""
        self._num_called = 0

    def is_busy(self, name: str) -> bool:
        """Returns whether a change of the model runs or waits."""
        return name in self._queues

    def submit(self, name: str, work: Callable[[], T]) -> Future[T]:
        """Starts a change, after those of the same model that run or wait.

        Raises:
            Unavailable: the process has no more threads.
        """
        future: Future[T] = Future()
        change = _Change(future, work)
        with self._lock:
            if name in self._queues:
                self._queues[name].append(change)
            else:
                thread = threading.Thread(target=self._work, args=(name,), name=f"change-{name}", daemon=True)
                self._queues[name] = deque([change])
                try:
                    thread.start()
                except RuntimeError as error:
                    del self._queues[name]
                    raise Unavailable(f"the change of model '{name}' was not started: {error}") from error
        return future

    def call(self, name: str, work: Callable[[], T], caller: Caller) -> T:
        """Runs a change for a caller, and returns its result.

        Raises:
            ResourceExhausted: too many changes run or wait already.
            DeadlineExceeded: the deadline has passed. A change that has started goes on.
            Cancelled: the caller has gone before the change was started.
            Unavailable: the change takes too long for a caller without a deadline, and goes on; or there is no thread.
        """
        with self._lock:
            if self._num_called >= MAX_CHANGES:
                message = f"{self._num_called} loads and unloads run or wait already: retry later"
                raise ResourceExhausted(message, _RETRY_AFTER_MS)
            self._num_called += 1

        def run() -> T:
            caller.check(name)
            return work()

        try:
            future = self.submit(name, run)
        except Unavailable:
            self._forget(name)
            raise
        future.add_done_callback(lambda _: self._forget(name))
        left_s = _MAX_WAIT_S if caller.deadline is None else max(0.0, caller.deadline - time.monotonic())
        finished, _ = wait([future], left_s)
        if finished:
            return future.result()
        was_waiting = future.cancel()
        state = "waits for another change and is not made" if was_waiting else "goes on; the index will show its result"
        if caller.deadline is None:
            raise Unavailable(f"after {_MAX_WAIT_S:.0f} s, the change of model '{name}' {state}")
        raise DeadlineExceeded(f"the deadline has passed: the change of model '{name}' {state}")

    def _forget(self, name: str) -> None:
        """Makes room for another caller, and drops changes whose callers have gone from the queue."""
        with self._lock:
            self._num_called -= 1
            if name in self._queues:
                self._queues[name] = deque(change for change in self._queues[name] if not change.future.cancelled())

    def _work(self, name: str) -> None:
        while True:
            with self._lock:
                if not self._queues[name]:
                    del self._queues[name]
                    return
                change = self._queues[name].popleft()
            change.run()


@dataclass(frozen=True, slots=True)
class _Change:
    future: Future[Any]
    work: Callable[[], Any]

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.work())
            except BaseException as error:
                self.future.set_exception(error)


class LoadTurn:
    """Lets one model load at a time, because loading takes memory and processors, and warming up measures time.

    Args:
        patience_s: after which the others no longer wait for a model that is loading.
    """

    def __init__(self, patience_s: float = LOAD_PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._holder = ""
        self._since: float | None = None
        """When the holder began, on the clock of `time.monotonic`; None if nothing loads."""
        self._token = object()

    @contextmanager
    def take(self, holder: str) -> Iterator[None]:
        """Waits for the turn, and holds it in the context."""
        with self._changed:
            while self._since is not None:
                left_s = self._since + self._patience_s - time.monotonic()
                if left_s <= 0:
                    logger.warning(
                        "%s is still loading after %g s: others wait no longer", self._holder, self._patience_s
                    )
                    break
                self._changed.wait(left_s)
            self._since = time.monotonic()
            mine = self._token = object()
            self._holder = holder
        try:
            yield
        finally:
            with self._changed:
                if self._token is mine:
                    self._since = None
                    self._changed.notify_all()
