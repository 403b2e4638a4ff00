"""A sink in a thread of its own: a service that answers slowly, or never, delays no step of a training."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from trainer.sinks.base import Kind, Mistake, Outcome, Sink

MAX_WAITING = 10_000
"""Calls that wait for the service; later ones are lost."""
CLOSE_TIMEOUT_S: dict[Outcome, float] = {"finished": 60.0, "failed": 10.0, "interrupted": 10.0}


class SinkFailure(Exception):
    """The sink has failed, or has not kept up; its metrics from now on are lost."""


class BackgroundSink:
    """Passes calls on to a sink that a thread opens and uses.

    Raises:
        SinkFailure: from `write` and others, once, after the thread's first error.

    Args:
        open_sink: called in the thread.
    """

    def __init__(self, open_sink: Callable[[], Sink]) -> None:
        self._open = open_sink
        self._calls: queue.Queue[Callable[[Sink], None]] = queue.Queue(MAX_WAITING)
        self._is_closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="sink", daemon=True)
        self._thread.start()

    def write(self, kind: Kind, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self._pass_on(lambda sink: sink.write(kind, step=step, epoch=epoch, values=values))

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        self._pass_on(lambda sink: sink.show_mistakes(mistakes, step=step))

    def close(self, outcome: Outcome) -> None:
        """Waits until everything is written, for `CLOSE_TIMEOUT_S` at most."""

        def close(sink: Sink) -> None:
            sink.close(outcome)
            self._is_closed = True

        self._raise_error()
        until = time.monotonic() + CLOSE_TIMEOUT_S[outcome]
        with suppress(queue.Full):
            self._calls.put(close, timeout=CLOSE_TIMEOUT_S[outcome])
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            raise SinkFailure(f"not all metrics were written within {CLOSE_TIMEOUT_S[outcome]:.0f} s")
        self._raise_error()

    def _pass_on(self, call: Callable[[Sink], None]) -> None:
        self._raise_error()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            raise SinkFailure(f"{MAX_WAITING:,} metrics wait to be written") from None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise SinkFailure(str(self._error) or type(self._error).__name__) from self._error

    def _work(self) -> None:
        try:
            sink = self._open()
            while not self._is_closed:
                self._calls.get()(sink)
        except (Exception, SystemExit) as error:
            self._error = error
