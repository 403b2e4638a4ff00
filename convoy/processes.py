"""Ends commands: at once, and without a traceback on Ctrl-C and when their output cannot be written."""

import atexit
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
def whole_command() -> Iterator[None]:
    """Wraps a whole command, including its imports.

    - Ctrl-C ends the process at once, until `restore_ctrl_c` is called. So does SIGTERM, which the first process of a
      container would otherwise not get, until the command handles it.
    - If a write to standard output fails, because the reader has closed the pipe (`… | head`) or for any other reason,
      it raises BrokenPipeError, and the process exits with 128 + SIGPIPE.
    - The process ends without Python's teardown, after all that `atexit` knows: once torch is imported, the teardown
      takes 0.7 s of processor time, in which threads of libraries may still crash.
    """
    exit_on_ctrl_c()
    sys.stdout, sys.stderr = _Output.instead_of(sys.stdout), _Errors.instead_of(sys.stderr)
    end = _End()
    atexit.register(end)  # what is registered first runs last
    try:
        try:
            yield
            end.code = 0
        except SystemExit as error:
            end.code = _exit_code(error)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError as error:
        if error.errno != errno.EPIPE:
            print(f"error: {describe_output_error(error)}", file=sys.stderr)
        os._exit(128 + signal.SIGPIPE)  # a normal exit would flush again, fail again and print a traceback


def describe_output_error(error: BrokenPipeError) -> str:
    """Returns one line about an output error that `whole_command` raised."""
    return "SIGPIPE" if error.errno == errno.EPIPE else f"cannot write the output ({error.strerror})"


def exit_on_ctrl_c() -> None:
    """Makes Ctrl-C end the process at once, and SIGTERM, too, if it is the first process of a container.

    A KeyboardInterrupt during an import, which takes seconds for torch, can surface as any other exception. The kernel
    hides SIGTERM from the first process of a container, unless it has a handler.
    """
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, exit_immediately)
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
def ignore_signals(*, for_good: bool = False) -> Iterator[None]:
    """Ignores `STOP_SIGNALS` inside the context, and restores their handlers at its end.

    Args:
        for_good: restores none, as the process is about to end.
    """
    old = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items() if not for_good else ():
            signal.signal(number, handler)


class _End:
    """Ends the process without Python's teardown. Does nothing after an error that nobody caught."""

    code: int | None = None

    def __call__(self) -> None:
        if self.code is None:
            return
        if "logging" in sys.modules:  # a command may have imported it before it was wrapped
            sys.modules["logging"].shutdown()
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self.code)


def _exit_code(error: SystemExit) -> int:
    """Returns the code with which Python ends the process."""
    match error.code:
        case None:
            return 0
        case int(code):
            return code & 0xFF
        case _:
            return 1  # Python prints it


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
