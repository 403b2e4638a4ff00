"""Checks an address before gRPC binds it: gRPC's core writes lines of its own to standard error when it fails."""

import socket
import stat
from pathlib import Path

from serving.errors import StartupError

UNIX = "unix:"
_PROBE_TIMEOUT_S = 1.0
_MAX_PORT = 65535


def check_address(address: str) -> None:
    """Checks that `host:port` or `unix:/path` is free.

    Raises:
        StartupError: the address is malformed, in use, or not of this host.
    """
    try:
        if address.startswith(UNIX):
            _check_path(Path(address.removeprefix(UNIX)))
        else:
            _check_port(address)
    except (OSError, OverflowError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StartupError(f"cannot listen on {address}: {reason[:1].lower()}{reason[1:]}") from error


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
