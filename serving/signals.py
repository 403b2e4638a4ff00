"""What ends a command from outside: Ctrl-C, and output that nobody reads or no disk takes any more; no stack trace."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def quiet_end() -> Iterator[None]:
    """Around a whole command, imports included.

    Ctrl-C ends the process at once wherever nobody else listens to it: raised amid imports, an exception could come out
    as any other one. Where nobody reads the output any more (`… | head`), or its disk is full, the exit code is that of
    SIGPIPE.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell has it ignored
        signal.signal(signal.SIGINT, _leave_at_once)
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
            print(end="", flush=True, file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:  # nothing but output is ever written
            with suppress(OSError):
                print(f"error: cannot write the output ({error.strerror})", file=sys.stderr)
        os._exit(128 + signal.SIGPIPE)  # Python would try once more at its end, and complain


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
