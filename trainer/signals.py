"""SIGTERM and Ctrl-C as a wish that the training loop reads between two steps."""

import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Self

STUCK_AFTER_S = 8.0
"""A process that has not come back to Python this long after a signal hangs in a call that will not return."""


class StopRequest:
    """Context in which SIGTERM and SIGINT only set `number`; the old handlers come back at its end.

    A rank that waits in a collective for a rank that is gone never returns to Python, so that its handler never runs.
    The wake-up socket is written by the C-level handler all the same, and a thread that reads it ends the process.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._handled = threading.Event()

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
        self._handled.set()
        self._writer.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._handled.set()

    def _watch(self) -> None:
        with self._reader:
            received = self._reader.recv(1)
            if received and not self._handled.wait(STUCK_AFTER_S):
                os._exit(128 + received[0])
