"""Signals that ask a run to end, such as SIGTERM and Ctrl-C: at once, or at the end of a training step."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from convoy.processes import STOP_SIGNALS
from trainer.errors import Interrupted

GRACE_PERIOD_S = 8.0
"""A process that has neither exited nor stopped training this long after a signal is stuck, and is ended."""
REPEAT_WITHIN_S = 2.0
"""A second signal within this time is the first one again: torchrun forwards what the terminal has already sent."""


def handled_signals() -> list[signal.Signals]:
    """Returns the signals that ask a run to end: without SIGHUP where `nohup` has set it to be ignored."""
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (is_nohup and number == signal.SIGHUP)]


class StopRequest:
    """Context in which `handled_signals` raise `Interrupted`; its end restores the old handlers.

    A rank that waits in a collective for a rank that is gone never returns to Python code or to the training loop. Even
    then the C-level signal handler writes to the wake-up socket, and a thread that reads it ends the process, unless
    the context ends or the training loop calls `acknowledge` within the grace period.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        """The signal that was received, if any."""
        self.grace_period_s = GRACE_PERIOD_S
        """Time that a training step may take to end after a signal; at least `GRACE_PERIOD_S`."""
        self._cause = ""
        self._received_at = 0.0
        self._is_deferred = False
        self._settled = threading.Event()

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno())
        self._old = {number: signal.signal(number, self._handle) for number in handled_signals()}
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
        """Context for training steps: a signal only sets `signal_number`; a second one raises at once.

        Raises:
            Interrupted: at the end, if a signal was received and nothing has raised for it.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.signal_number is not None:
            raise self.interruption("stopped", self.signal_number)

    def request(self, number: int, cause: str) -> None:
        """Acts as if that signal had been received, unless one was.

        Args:
            cause: text for the user in place of the signal's name.
        """
        if self.signal_number is None:
            self._cause = cause
            self._handle(number, None)

    def interruption(self, outcome: str, number: int) -> Interrupted:
        """Returns the exception to raise for that signal."""
        cause = self._cause if number == self.signal_number else ""
        return Interrupted(cause or signal.Signals(number).name, outcome, number)

    def acknowledge(self) -> None:
        """Ends the grace period: the run is stopping, and may take as long as it needs."""
        self._settled.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number, self._received_at = number, time.monotonic()
            if not self._is_deferred:
                raise self.interruption("stopped", number)
        elif self._is_deferred and time.monotonic() - self._received_at > REPEAT_WITHIN_S:
            raise self.interruption("stopped", number)

    def _watch(self) -> None:
        with self._reader:
            received = self._reader.recv(1)
            received_at, grace_period_s = time.monotonic(), GRACE_PERIOD_S
            while received and not self._settled.wait(0.1):
                grace_period_s = max(grace_period_s, self.grace_period_s)
                if time.monotonic() - received_at > grace_period_s:
                    os._exit(128 + received[0])
            while self._reader.recv(1):  # to the end: Python's handler complains about a socket without a reader
                pass
