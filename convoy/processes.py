"""How a command ends from outside: Ctrl-C, and output that cannot be written. No traceback in either case."""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


@contextmanager
def exit_on_broken_pipe() -> Iterator[None]:
    """Wraps a whole command, imports included.

    Ctrl-C ends the process at once until `restore_ctrl_c` is called. A write to standard output that fails, because the
    reader has gone (`… | head`) or for any other reason, raises BrokenPipeError, and the process exits with 128 +
    SIGPIPE.
    """
    exit_on_ctrl_c()
    sys.stdout, sys.stderr = _Output.instead_of(sys.stdout), _Errors.instead_of(sys.stderr)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError as error:
        if error.errno != errno.EPIPE:
            print(f"error: {describe_output_error(error)}", file=sys.stderr)
        os._exit(128 + signal.SIGPIPE)  # a normal exit flushes once more, fails again and prints a traceback


def describe_output_error(error: BrokenPipeError) -> str:
    """Describes an output error that `exit_on_broken_pipe` has detected."""
    return "SIGPIPE" if error.errno == errno.EPIPE else f"cannot write the output ({error.strerror})"


def exit_on_ctrl_c() -> None:
    """Makes Ctrl-C end the process at once.

    A KeyboardInterrupt during the seconds that importing torch takes could surface as any other exception.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell ignores SIGINT for this process
        signal.signal(signal.SIGINT, exit_immediately)


def restore_ctrl_c() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, so that the command can clean up."""
    if signal.getsignal(signal.SIGINT) is exit_immediately:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_immediately(number: int, frame: FrameType | None) -> None:
    """Signal handler: ends the process without cleaning up."""
    os._exit(128 + number)


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignores SIGTERM and SIGINT inside the context, and restores their handlers at its end."""
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Output(io.TextIOWrapper):
    """Standard output on which every failure is a BrokenPipeError, distinct from the failures of other files."""

    @classmethod
    def instead_of(cls, stream: Any) -> Any:
        if stream is None:  # closed before Python started
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
    """Standard error, whose own failures nobody can be told of: the exit code must do."""

    @contextmanager
    def _failing(self) -> Iterator[None]:
        with suppress(OSError):
            yield
