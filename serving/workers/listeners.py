"""Lets the listeners of a worker that is killed end before its connections.

When a process ends, Linux closes its files from the highest number down. A listener has one of the lowest. So clients
whose connections have just ended would connect again while the listener is still there: the kernel sends some of them
to it, and they fail a second time. A second number for the same listener, above those of all connections, lets it end
first: then all who connect again reach other workers.
"""

import fcntl
import os
from contextlib import suppress

from convoy.open_files import max_open_files
from serving.frontends.common.address import listeners

_HIGHEST = 1 << 16
"""The kernel's table of files takes 8 bytes for each number up to the highest one."""
_ROOM = 64
"""Numbers for the listeners: gRPC's core may have several."""


class HighListeners:
    """High numbers for the listeners of this process, which keep them open: close them before the front ends stop."""

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def hold(self, *ports: int) -> None:
        """Gives a high number to each socket that listens on one of the ports."""
        lowest = min(max_open_files(), _HIGHEST) - _ROOM
        for port in ports:
            for listener in listeners(port):
                with suppress(OSError):  # no number is left
                    self._numbers.append(fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD_CLOEXEC, lowest))

    def close(self) -> None:
        """Gives the numbers up."""
        while self._numbers:
            os.close(self._numbers.pop())
