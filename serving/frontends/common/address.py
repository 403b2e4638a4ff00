"""Addresses of gRPC servers: checked before gRPC binds them, private ones, and the backlog of those that listen.

gRPC's core writes lines of its own to standard error when it cannot bind an address.
"""

import os
import secrets
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from serving.errors import StartupError
from serving.frontends.common.limits import BACKLOG

UNIX = "unix:"
ABSTRACT = "unix-abstract:"
"""Linux: a Unix socket without a file."""

_PROBE_TIMEOUT_S = 1.0
_MAX_PORT = 65535


def check_address(address: str) -> None:
    """Checks that `host:port` or `unix:/path` is free. An abstract address is not checked.

    Raises:
        StartupError: the address is malformed, in use, or not of this host.
    """
    if address.startswith(ABSTRACT):
        return
    try:
        if address.startswith(UNIX):
            _check_path(Path(address.removeprefix(UNIX)))
        else:
            _check_port(address)
    except (OSError, OverflowError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StartupError(f"cannot listen on {address}: {reason[:1].lower()}{reason[1:]}") from error


def private_address(address: str) -> str:
    """Returns an address for the calls that a front end forwards to another one of the same process.

    Beside a Unix socket it is a second one in the same folder, open to the same users. Otherwise it is abstract, if the
    system has that: then it needs no temporary folder, nothing can remove it, and it ends with the process. Every user
    of the machine can connect to it, as to a port on loopback.

    Args:
        address: of the front end that forwards.
    """
    if address.startswith(UNIX):
        return f"{address}.streams"
    name = f"convoy-{secrets.token_hex(16)}"
    return f"{ABSTRACT}{name}" if sys.platform == "linux" else f"{UNIX}{tempfile.gettempdir()}/{name}"


def socket_path(address: str) -> str:
    """Returns the path of a Unix socket; that of an abstract one begins with a null character, as in `socket.bind`."""
    return f"\0{address.removeprefix(ABSTRACT)}" if address.startswith(ABSTRACT) else address.removeprefix(UNIX)


def raise_backlog(place: int | str) -> None:
    """Lets more connections wait to be accepted: `listen` may be called again on a socket that listens.

    Args:
        place: the port or the path on which sockets of this process listen.
    """
    for listener in listeners(place):
        with suppress(OSError):
            listener.listen(BACKLOG)


def listeners(place: int | str) -> Iterator[socket.socket]:
    """Yields each socket of this process that listens on a port or a path; none on systems without /dev/fd.

    They are duplicates, which are closed when the next one is asked for.
    """
    with suppress(OSError):
        for number in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):  # closed since, or not a socket
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    with socket.socket(fileno=os.dup(number)) as found:
                        if _listens(found, place):
                            yield found


def _listens(found: socket.socket, place: int | str) -> bool:
    name = found.getsockname()
    is_there = place == (name[1] if isinstance(name, tuple) else name)
    return is_there and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _check_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise ValueError(f"expected unix:/PATH, or HOST:PORT with a port up to {_MAX_PORT}")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC binds: a port whose connections have just ended is free, one with a listener is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)


def _check_path(path: Path) -> None:
    """Checks a socket's path. gRPC would replace a socket in use without an error."""
    if not path.exists():
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise FileExistsError("it exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # left behind by a server that has ended
    raise OSError("address already in use")
