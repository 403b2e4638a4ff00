"""Gives up on a backend that hangs while a version is opened or checked: a load must end, whatever a model does."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

from serving.backends import Backend
from serving.errors import LoadError
from serving.protocol.tensors import Array

_PAUSE_S = 0.25

T = TypeVar("T")


class TimedBackend:
    """A backend that notes when its run in progress began.

    Attributes:
        began: on the clock of `time.monotonic`; None while nothing runs.
    """

    def __init__(self, backend: Backend) -> None:
        self.inputs = backend.inputs
        self.outputs = backend.outputs
        self.uses_gpu = backend.uses_gpu
        self.began: float | None = None
        self._backend = backend

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.began = time.monotonic()
        try:
            return self._backend.run(inputs)
        finally:
            self.began = None

    def close(self) -> None:
        self._backend.close()


def call_with_limit(check: Callable[[Sequence[Backend]], T], backends: Sequence[Backend], limit_s: float) -> T:
    """Calls `check` with the backends on a thread of its own, which is left behind if a run takes too long.

    Args:
        limit_s: of a single run, not of all; 0 for none.

    Raises:
        LoadError: a run takes longer. All that `check` raises is raised, too.
    """
    if not limit_s:
        return check(backends)
    timed = [TimedBackend(backend) for backend in backends]
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(check(timed))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="warm-up", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_PAUSE_S)
        now = time.monotonic()
        if any(began is not None and now - began > limit_s for began in [backend.began for backend in timed]):
            raise LoadError(f"the model hangs: it did not finish a batch within {limit_s:g} s while it was checked")
    if errors:
        raise errors[0]
    return results[0]


def open_with_limit(open_all: Callable[[], Sequence[Backend]], limit_s: float) -> Sequence[Backend]:
    """Opens instances on a thread of its own, which is left behind if it takes too long; it then closes what it opens.

    Args:
        limit_s: 0 for none.

    Raises:
        LoadError: it takes longer. All that `open_all` raises is raised, too.
    """
    if not limit_s:
        return open_all()
    result: Future[Sequence[Backend]] = Future()

    def work() -> None:
        try:
            opened = open_all()
        except BaseException as error:
            if not result.cancelled():
                result.set_exception(error)
            return
        if not result.set_running_or_notify_cancel():
            for backend in opened:
                backend.close()
            return
        result.set_result(opened)

    threading.Thread(target=work, name="open-model", daemon=True).start()
    if not wait([result], limit_s).done and result.cancel():
        raise LoadError(f"the model hangs: its backend did not open it within {limit_s:g} s")
    return result.result()
