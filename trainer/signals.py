"""SIGTERM and Ctrl-C during a run: at once, or deferred to the end of a training step."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from trainer.errors import Interrupted

STUCK_AFTER_S = 8.0
"""A process that has neither exited nor stopped training this long after a signal is stuck, and is ended."""
AGAIN_AFTER_S = 2.0
"""A second signal within this time is the first one again: torchrun forwards what the terminal has already sent."""


class StopRequest:
    """Context in which SIGTERM and SIGINT raise `Interrupted`; the old handlers come back at its end.

    A rank that waits in a collective for a rank that is gone never returns to Python, or to the training loop. The
    wake-up socket is written by the C-level handler all the same, and a thread that reads it ends the process unless
    the context ends, or the wish is granted, in time.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came, if one did."""
        self.patience_s = STUCK_AFTER_S
        """How long whoever defers signals may take to grant the wish; at least `STUCK_AFTER_S` are given."""
        self._cause = ""
        self._came_at = 0.0
        self._is_deferred = False
        self._settled = threading.Event()

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno())
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._watch, name="signal-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._settled.set()
        self._writer.close()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Around training steps: a signal is a wish that sets `number`, and only a second one raises at once.

        Raises:
            Interrupted: at the end, where the wish has not been granted before.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.number is not None:
            raise self.interrupted("stopped", self.number)

    def ask(self, number: int, cause: str) -> None:
        """As if that signal had come, unless one has come already; the user is told of `cause`."""
        if self.number is None:
            self._cause = cause
            self._handle(number, None)

    def interrupted(self, outcome: str, number: int) -> Interrupted:
        """What to raise for that signal."""
        cause = self._cause if number == self.number else ""
        return Interrupted(cause or signal.Signals(number).name, outcome, number)

    def grant(self) -> None:
        """The wish is being granted; that takes as long as it takes."""
        self._settled.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._came_at = number, time.monotonic()
            if not self._is_deferred:
                raise self.interrupted("stopped", number)
        elif self._is_deferred and time.monotonic() - self._came_at > AGAIN_AFTER_S:
            raise self.interrupted("stopped", number)

    def _watch(self) -> None:
        with self._reader:  # open to the end: the handler would complain of a socket that nobody reads
            received = self._reader.recv(1)
            came_at, patience_s = time.monotonic(), STUCK_AFTER_S
            while received and not self._settled.wait(0.1):
                patience_s = max(patience_s, self.patience_s)
                if time.monotonic() - came_at > patience_s:
                    os._exit(128 + received[0])
