"""How a connection writes and closes."""

import asyncio
from collections.abc import Callable
from typing import Any

LINGER_S = 2.0
"""How long a closing connection passes over what its client still sends."""


class LingeringTransport:
    """A transport that joins small writes, and closes so that the client can read the response.

    uvicorn writes the head and the body of a response one by one: here, the writes of one turn of the event loop become
    one system call. A connection that is closed with unread data is reset, and its client may lose the response: here,
    the stream ends, and the connection closes later (RFC 9112, section 9.6).

    Args:
        is_receiving: returns whether a request is still arriving.
    """

    __slots__ = ("_is_lingering", "_is_receiving", "_loop", "_parts", "_transport")

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop, is_receiving: Callable[[], bool]) -> None:
        self._transport = transport
        self._loop = loop
        self._is_receiving = is_receiving
        self._is_lingering = False
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Returns whether the connection is closed, or about to be: no more requests are answered."""
        return self._is_lingering or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Sends data at the end of this turn; nothing more on a connection that closes."""
        if self.is_closing():
            return
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Sends what has been written, and closes the connection; later, if a request is still arriving."""
        if self._is_receiving():
            self.linger()
        elif not self._is_lingering:
            self._flush()
            self._transport.close()

    def linger(self) -> None:
        """Sends what has been written and the end of the stream, and closes the connection later."""
        if self.is_closing():
            return
        self._flush()
        if self._transport.can_write_eof():
            self._is_lingering = True
            self._transport.write_eof()
            self._loop.call_later(LINGER_S, self._transport.abort)
        else:  # TLS
            self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():  # its client may have closed it in this turn
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))
