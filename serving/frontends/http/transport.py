"""Joins small writes to a connection."""

import asyncio
from typing import Any


class CoalescingTransport:
    """A transport that joins the writes of one turn of the event loop into one system call.

    uvicorn writes the head and the body of a response one by one.
    """

    __slots__ = ("_loop", "_parts", "_transport")

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Sends data at the end of this turn."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def write_eof(self) -> None:
        """Sends what has been written, and the end of the stream."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Sends what has been written, and closes the connection."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))
