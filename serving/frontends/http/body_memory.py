"""Counts the bodies of requests in the memory of messages, from their first large piece until their response.

While the memory is full, large bodies are refused. A body that arrives slowly must not keep others out: one that takes
longer than `PATIENCE_S` gives its place to the next that needs it, the oldest first.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ResourceExhausted
from serving.inference.message_memory import MemoryShare, MessageMemory

PATIENCE_S = 10.0
"""How long a large body may arrive while the memory is full."""

SHARE = "convoy.share"
"""Key of a request's `MemoryShare` in its scope."""


class CountedBodies:
    """An application whose requests are counted."""

    def __init__(self, app: ASGIApp, memory: MessageMemory) -> None:
        self._app = app
        self._memory = memory
        self._arriving: dict[_Body, float] = {}
        """The large bodies that have not arrived in whole, the oldest first, and since when they arrive."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(self, MemoryShare(self._memory), receive)
        scope[SHARE] = body.share
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._arriving.pop(body, None)
            body.share.free()

    def count(self, body: "_Body", num_bytes: int, *, is_last: bool) -> None:
        """Counts a piece of a body.

        Raises:
            ResourceExhausted: the memory is full, and no body is so slow that it must give its place.
        """
        while True:
            try:
                body.share.take(num_bytes)
                break
            except ResourceExhausted:
                if not self._end_slowest(body):
                    raise
        if is_last:
            self._arriving.pop(body, None)
        elif body.share.num_bytes:
            self._arriving.setdefault(body, asyncio.get_running_loop().time())

    def _end_slowest(self, newcomer: "_Body") -> bool:
        """Ends the body that takes longest to arrive, if that is too long. Returns whether it did."""
        oldest = next(iter(self._arriving), newcomer)
        if oldest is newcomer or asyncio.get_running_loop().time() - self._arriving[oldest] < PATIENCE_S:
            return False
        del self._arriving[oldest]
        oldest.end()
        return True


class _Body:
    """The body of one request."""

    __slots__ = ("_bodies", "_has_ended", "_receive", "_task", "share")

    def __init__(self, bodies: CountedBodies, share: MemoryShare, receive: Receive) -> None:
        self.share = share
        self._bodies = bodies
        self._receive = receive
        self._has_ended = False
        self._task: asyncio.Task[Any] | None = None

    async def receive(self) -> Message:
        """Returns the next message of the request; ASGI's `receive`."""
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if not self._has_ended or self._task is None:
                raise
            self._task.uncancel()
            raise ResourceExhausted(
                f"the body took longer than {PATIENCE_S:g} s while requests fill the server's memory: retry later", 1000
            ) from None
        if content := message.get("body"):
            self._bodies.count(self, len(content), is_last=not message.get("more_body", False))
            if self.share.num_bytes:
                self._task = asyncio.current_task()
        return message

    def end(self) -> None:
        """Lets `receive` fail, and frees the body's share of the memory."""
        assert self._task is not None
        self._has_ended = True
        self._task.cancel()
        self.share.free()
