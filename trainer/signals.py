"""What ends a command from outside: SIGTERM, Ctrl-C, and output that nobody reads or no disk takes any more.

It ends a run at once, or is a wish that the training loop grants between two steps; never a stack trace.
"""

import errno
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from trainer.errors import Interrupted

STUCK_AFTER_S = 8.0
"""A process that has neither left nor granted the wish this long after a signal waits for what will not come."""
AGAIN_AFTER_S = 2.0
"""A second signal that comes sooner is no second wish: torchrun passes on what the terminal has sent already."""


@contextmanager
def quiet_end() -> Iterator[None]:
    """Around a whole command, imports included.

    Ctrl-C ends the process at once until `hear_ctrl_c`. Output that cannot be written, because nobody reads it any more
    (`… | head`) or for whatever else, is a BrokenPipeError, and ends the command with the exit code of SIGPIPE.
    """
    leave_on_ctrl_c()
    sys.stdout, sys.stderr = _Output.instead_of(sys.stdout), _Errors.instead_of(sys.stderr)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError as error:
        if error.errno != errno.EPIPE:
            print(f"error: {why_unwritten(error)}", file=sys.stderr)
        os._exit(128 + signal.SIGPIPE)  # Python would try once more at its end, and complain


def why_unwritten(error: BrokenPipeError) -> str:
    """What to tell the user of output that `quiet_end` found could not be written."""
    return "SIGPIPE" if error.errno == errno.EPIPE else f"cannot write the output ({error.strerror})"


class _Output(io.TextIOWrapper):
    """Standard output of which every failure is a BrokenPipeError: so it is told from failures of files."""

    @classmethod
    def instead_of(cls, stream: Any) -> Any:
        if stream is None:  # closed before Python began
            return open(os.devnull, "w")
        options = {name: getattr(stream, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        return cls(stream.buffer, **options)

    def write(self, text: str) -> int:
        with self._failing():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            super().flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BrokenPipeError(error.errno, error.strerror) from None


class _Errors(_Output):
    """Standard error, whose failures can be told nobody: the exit code has to do."""

    @contextmanager
    def _failing(self) -> Iterator[None]:
        with suppress(OSError):
            yield


def leave_on_ctrl_c() -> None:
    """Ctrl-C ends the process at once: raised amid the seconds that importing torch takes, an exception could come out
    as any other one.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell has it ignored
        signal.signal(signal.SIGINT, leave_at_once)


def hear_ctrl_c() -> None:
    """From here on it is a KeyboardInterrupt: there may be something to tidy up."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """A signal's handler, where there is nothing to tidy up."""
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


@contextmanager
def ignored() -> Iterator[None]:
    """Around the last words of a process that fails: torchrun ends who is left as soon as a rank is gone."""
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
