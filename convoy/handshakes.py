"""The TLS handshakes of an HTTP server: how long one may take, and how many may be under way.

An event loop gives a handshake 60 s, and tells nobody of it until it has succeeded. So clients that connect and say
nothing would hold files that no limit of connections counts.
"""

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from convoy.open_files import max_open_files

HANDSHAKE_S = 20.0
"""How long a handshake may take, as with grpcio."""
MAX_HANDSHAKES = 1000


def max_handshakes() -> int:
    """Returns how many handshakes may be under way: an eighth of the files that the process may open."""
    return min(MAX_HANDSHAKES, max_open_files() // 8)


class Handshakes:
    """Makes the protocols of new connections: TLS, and behind it, once its handshake is over, the application's.

    At the limit, a further connection ends the handshake that has taken longest. For one event loop.

    Args:
        make_protocol: makes the application's protocol.
    """

    def __init__(self, context: ssl.SSLContext, make_protocol: Callable[..., asyncio.Protocol], limit: int) -> None:
        self._context = context
        self._make_protocol = make_protocol
        self._limit = limit
        self._pending: dict[asyncio.Transport, None] = {}  # the oldest one first

    def __call__(self, **options: Any) -> asyncio.Protocol:
        return _Accepted(partial(self._begin, self._make_protocol(**options)))

    def __len__(self) -> int:
        return len(self._pending)

    def abort(self) -> None:
        """Ends all handshakes."""
        for transport in list(self._pending):
            transport.abort()

    def _begin(self, protocol: asyncio.Protocol, transport: asyncio.Transport) -> None:
        if len(self._pending) >= self._limit:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            oldest.abort()
        self._pending[transport] = None
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        over.add_done_callback(partial(self._end, transport))
        make_tls = _tls_protocol(loop)
        tls = make_tls(loop, protocol, self._context, over, server_side=True, ssl_handshake_timeout=HANDSHAKE_S)
        transport.set_protocol(tls)
        tls.connection_made(transport)

    def _end(self, transport: asyncio.Transport, over: "asyncio.Future[None]") -> None:
        self._pending.pop(transport, None)
        over.exception()  # marks it as retrieved: else asyncio logs it


class _Accepted(asyncio.Protocol):
    """A connection that has just been accepted."""

    def __init__(self, begin: Callable[[asyncio.Transport], None]) -> None:
        self._begin = begin

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(cast(asyncio.Transport, transport))


def _tls_protocol(loop: asyncio.AbstractEventLoop) -> Any:
    """Returns the class that the event loop itself uses for TLS: uvloop's is compiled."""
    if not type(loop).__module__.startswith("uvloop"):
        return SSLProtocol
    import uvloop.loop

    return getattr(uvloop.loop, "SSLProtocol", SSLProtocol)
