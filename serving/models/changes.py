"""Runs the changes of models: one after the other for each model, side by side for different models.

Each change has a thread, so that one that hangs in a backend or on a disk holds up its own model only, and callers wait
no longer than they want to.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.errors import Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable

logger = logging.getLogger(__name__)

MAX_CHANGES = 16
"""Changes of callers that may run or wait at once."""

_MAX_WAIT_S = 600.0
"""How long a caller without a deadline waits."""
_LOOK_S = 0.25
"""Pause between two looks whether a caller that waits has gone: it must not keep its place from others."""

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


class LeftChange(Exception):
    """The cause of an error of `Changes.call` whose change goes on.

    Args:
        future: of the change.
    """

    def __init__(self, future: Future[Any]) -> None:
        super().__init__()
        self.future = future


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

        Where the system has no thread for it, it has ended when this returns.
        """
        future: Future[T] = Future()
        try:
            self._enqueue(name, _Change(future, work))
        except RuntimeError:
            self._work(name)
        return future

    def _enqueue(self, name: str, change: "_Change") -> None:
        """Adds a change to those of its model, and starts a thread that makes them unless there is one.

        Raises:
            RuntimeError: the system has no thread; the changes wait for `_work`.
        """
        with self._lock:
            is_first = name not in self._queues
            self._queues.setdefault(name, deque()).append(change)
        if is_first:
            threading.Thread(target=self._work, args=(name,), name=f"change-{name}", daemon=True).start()

    def call(self, name: str, work: Callable[[], T], caller: Caller) -> T:
        """Runs a change for a caller, and returns its result.

        Raises:
            ResourceExhausted: too many changes run or wait already.
            DeadlineExceeded: the deadline has passed. A change that has started goes on.
            Cancelled: the caller has gone. A change that has started goes on.
            Unavailable: the change takes too long for a caller without a deadline, and goes on; or there is no thread.
        """
        caller.check(name)
        with self._lock:
            if self._num_called >= MAX_CHANGES:
                message = f"{self._num_called} loads and unloads run or wait already: retry later"
                raise ResourceExhausted(message, _RETRY_AFTER_MS)
            self._num_called += 1

        def run() -> T:
            caller.check(name)
            return work()

        future: Future[T] = Future()
        try:
            self._enqueue(name, _Change(future, run))
        except RuntimeError as error:
            future.cancel()
            self._work(name)  # what others have added meanwhile
            self._forget(name)
            raise Unavailable(f"the change of model '{name}' was not started: {error}") from error
        future.add_done_callback(lambda _: self._forget(name))
        if self._wait(future, caller):
            return future.result()
        was_waiting = future.cancel()
        left = None if was_waiting else LeftChange(future)
        state = "waits for another change and is not made" if was_waiting else "goes on; the index will show its result"
        if caller.is_cancelled():
            raise Cancelled(f"the caller has gone: the change of model '{name}' {state}") from left
        if caller.deadline is None:
            raise Unavailable(f"after {_MAX_WAIT_S:.0f} s, the change of model '{name}' {state}") from left
        raise DeadlineExceeded(f"the deadline has passed: the change of model '{name}' {state}") from left

    def _wait(self, future: Future[Any], caller: Caller) -> bool:
        """Waits for a change as long as its caller does. Returns whether it has been made."""
        until = time.monotonic() + _MAX_WAIT_S if caller.deadline is None else caller.deadline
        while (left_s := until - time.monotonic()) > 0 and not caller.is_cancelled():
            if wait([future], min(left_s, _LOOK_S)).done:
                return True
        return future.done()

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


def wait_for_room(changes: list[Future[None]], num: int, patience_s: float) -> None:
    """Drops changes that have ended from the list, and waits while `num` or more run, but no longer than patience."""
    changes[:] = [change for change in changes if not change.done()]
    if len(changes) >= num:
        wait(changes, patience_s, FIRST_COMPLETED)


@dataclass(eq=False, slots=True)
class _Load:
    """A load that has its turn: since when, on the clock of `time.monotonic`, and how much memory it may take."""

    holder: str
    num_bytes: int
    since: float
    is_late: bool = False


class LoadTurn:
    """Lets a few models load at a time, because loading takes memory and processors, and warming up measures time.

    Args:
        patience_s: after which the others no longer wait for a model that is loading.
        num_loads: how many may load at once.
        free_bytes: returns the memory that is left. A load waits while it and those that run may take more than that,
            unless none runs.
    """

    def __init__(
        self,
        patience_s: float = LOAD_PATIENCE_S,
        num_loads: int = 1,
        free_bytes: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._patience_s = patience_s
        self._num_loads = num_loads
        self._free_bytes = free_bytes
        self._changed = threading.Condition()
        self._loads: list[_Load] = []

    @contextmanager
    def take(self, holder: str, num_bytes: int = 0) -> Iterator[None]:
        """Waits for a turn, and holds it in the context.

        Args:
            num_bytes: memory that the load may take.
        """
        with self._changed:
            while (wait_s := self._wait_s(num_bytes)) > 0:
                self._changed.wait(wait_s)
            mine = _Load(holder, num_bytes, time.monotonic())
            self._loads.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._loads.remove(mine)
                self._changed.notify_all()

    def _wait_s(self, num_bytes: int) -> float:
        """Returns how long to wait at most before the next look; 0 if there is room now."""
        now = time.monotonic()
        for load in self._loads:
            if not load.is_late and now - load.since >= self._patience_s:
                load.is_late = True
                logger.warning("%s is still loading after %g s: others wait no longer", load.holder, self._patience_s)
        loads = [load for load in self._loads if not load.is_late]
        if not loads:
            return 0
        needed = num_bytes + sum(load.num_bytes for load in loads)
        if len(loads) < self._num_loads and (not needed or needed <= self._free_bytes()):
            return 0
        return max(0.001, min(load.since for load in loads) + self._patience_s - now)
