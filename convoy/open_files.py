"""How many files, sockets among them, this process may open, and descriptors that are kept for a listener."""

import ctypes
import errno
import os
import resource
import socket
from contextlib import suppress

MAX_OPEN_FILES = 1 << 20
"""What an unlimited process counts with."""
MAX_RESERVE = 64


def max_open_files() -> int:
    """Returns the soft limit, and at most `MAX_OPEN_FILES`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(soft, MAX_OPEN_FILES)


class Reserve:
    """Descriptors that are kept open for one listener, which gives them up when the process may open no more files.

    So it accepts connections when others of the process have taken all descriptors. One that waits for a descriptor all
    the time may take one for good now and then, between the end of a connection and the refill.

    Args:
        size: None for a sixteenth of the files that the process may open, and at most `MAX_RESERVE`.
    """

    def __init__(self, size: int | None = None) -> None:
        self._size = min(MAX_RESERVE, max_open_files() // 16) if size is None else size
        self._spares: list[int] = []
        self.refill()

    @property
    def is_short(self) -> bool:
        """Whether descriptors have been given up."""
        return len(self._spares) < self._size

    def refill(self) -> None:
        """Takes the descriptors back that have become free. Call it when a connection has been closed."""
        with suppress(OSError):
            while self.is_short:
                self._spares.append(os.open(os.devnull, os.O_RDONLY))

    def close(self) -> None:
        """Gives all descriptors up."""
        self._size = 0
        while self._spares:
            os.close(self._spares.pop())

    def accept(self, listener: socket.socket) -> socket.socket:
        """Returns a connection that waits on a listener that does not block.

        Raises:
            OSError: as of `socket.accept`; EMFILE or ENFILE if no descriptor is left.
        """
        while True:
            try:
                return listener.accept()[0] if not self.is_short else _accept(listener)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._spares:
                    raise
            # Another thread that waits for a descriptor must not run in between: neither call lets go of the GIL.
            _libc.close(self._spares.pop())


_libc = ctypes.PyDLL(None, use_errno=True)


def _accept(listener: socket.socket) -> socket.socket:
    """Accepts a connection without letting go of the GIL."""
    descriptor = _libc.accept(listener.fileno(), None, None)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)
