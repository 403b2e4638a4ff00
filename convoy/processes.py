"""Ends commands without a traceback on Ctrl-C and when their output cannot be written."""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,  # the terminal has closed
    signal.SIGUSR1,  # schedulers send this one and the next before they end a job: Slurm by --signal, LSF, SGE
    signal.SIGUSR2,
    signal.SIGXCPU,  # the limit of CPU time is near
)
"""Signals that ask a process to save and end."""


@contextmanager
def exit_on_broken_pipe() -> Iterator[None]:
    """Wraps a whole command, including its imports.

    Ctrl-C ends the process at once, until `restore_ctrl_c` is called. If a write to standard output fails, because the
    reader has closed the pipe (`… | head`) or for any other reason, it raises BrokenPipeError, and the process exits
    with 128 + SIGPIPE.
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
        os._exit(128 + signal.SIGPIPE)  # a normal exit would flush again, fail again and print a traceback


def describe_output_error(error: BrokenPipeError) -> str:
    """Returns one line about an output error that `exit_on_broken_pipe` raised."""
    return "SIGPIPE" if error.errno == errno.EPIPE else f"cannot write the output ({error.strerror})"


def exit_on_ctrl_c() -> None:
    """Makes Ctrl-C end the process at once.

    A KeyboardInterrupt during an import, which takes seconds for torch, can surface as any other exception.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise the shell has set it to be ignored
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
    """Ignores `STOP_SIGNALS` inside the context, and restores their handlers at its end."""
    old = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Output(io.TextIOWrapper):
    """Standard output whose every failure is a BrokenPipeError, unlike the failures of other files."""

    @classmethod
    def instead_of(cls, stream: Any) -> Any:
        if stream is None:  # closed before Python started
            return open(os.devnull, "w")
        options = {name: getattr(stream, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        if options["errors"] == "strict":  # a file name that is not UTF-8 must not end a command
            options["errors"] = "backslashreplace"
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
    """Standard error, whose failures are ignored: there is nowhere left to report them."""

    @contextmanager
    def _failing(self) -> Iterator[None]:
        with suppress(OSError):
            yield
