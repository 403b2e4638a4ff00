"""What ends a command from outside: SIGTERM, Ctrl-C, and a reader of its output who goes away.

It ends a run at once, or is a wish that the training loop grants between two steps; never a stack trace.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from trainer.errors import Interrupted

STUCK_AFTER_S = 8.0
"""A process that has neither left nor granted the wish this long after a signal waits for what will not come."""
AGAIN_AFTER_S = 2.0
"""A second signal that comes sooner is no second wish: torchrun passes on what the terminal has sent already."""


@contextmanager
def quiet_end() -> Iterator[None]:
    """Around a whole command, imports included.

    Ctrl-C ends the process at once until `hear_ctrl_c`. And where nobody reads the output any more (`… | head`), the
    exit code is that of SIGPIPE.
    """
    leave_on_ctrl_c()
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
            print(end="", flush=True, file=sys.stderr)
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)  # Python would try once more at its end, and complain


def leave_on_ctrl_c() -> None:
    """Ctrl-C ends the process at once: raised amid the seconds that importing torch takes, an exception could come out
    as any other one.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell has it ignored
        signal.signal(signal.SIGINT, _leave_at_once)


def hear_ctrl_c() -> None:
    """From here on it is a KeyboardInterrupt: there may be something to tidy up."""
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


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
            raise _interrupted(self.number)

    def ask(self, number: int) -> None:
        """As if that signal had come, unless one has come already."""
        if self.number is None:
            self._handle(number, None)

    def grant(self) -> None:
        """The wish is being granted; that takes as long as it takes."""
        self._settled.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._came_at = number, time.monotonic()
            if not self._is_deferred:
                raise _interrupted(number)
        elif self._is_deferred and time.monotonic() - self._came_at > AGAIN_AFTER_S:
            raise _interrupted(number)

    def _watch(self) -> None:
        with self._reader:  # open to the end: the handler would complain of a socket that nobody reads
            received = self._reader.recv(1)
            came_at, patience_s = time.monotonic(), STUCK_AFTER_S
            while received and not self._settled.wait(0.1):
                patience_s = max(patience_s, self.patience_s)
                if time.monotonic() - came_at > patience_s:
                    os._exit(128 + received[0])


@contextmanager
def ignored() -> Iterator[None]:
    """Around the last words of a process that fails: torchrun ends who is left as soon as a rank is gone."""
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _interrupted(number: int) -> Interrupted:
    return Interrupted(f"{signal.Signals(number).name}: stopped", number)
