"""Streams of a job: its log, and its events as server-sent events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import codecs
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from convoy.http_server import server_sent_event
from trainer.errors import TrainerError
from trainer.service.jobs import Event
from trainer.service.json_values import event_json
from trainer.service.logs import LogChunk
from trainer.service.pauses import with_pauses

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""A silent stream sends a comment so often: proxies close connections that are silent, and a dead client is noticed."""
RECONNECT_MS = 1000
"""A browser that has lost the connection waits so long before it connects again."""


async def server_sent(items: AsyncGenerator[T], write: Callable[[T], str]) -> AsyncIterator[str]:
    """Yields the text of a stream that a browser's EventSource reads.

    Args:
        write: returns an item as an event, whose id tells the service where to go on.
    """
    async with aclosing(items), aclosing(with_pauses(items, KEEP_ALIVE_S)) as found:
        yield f"retry: {RECONNECT_MS}\n\n"
        try:
            async for item in found:
                yield ": keep-alive\n\n" if item is None else write(item)
        except TrainerError as error:  # the client connects again after its last event
            yield f": {str(error).splitlines()[0]}\n\n"


def write_event(event: Event) -> str:
    """Returns an event of a job; its id is its number."""
    return server_sent_event(event.kind, event_json(event), event.number)


class LogEvents:
    """Writes the pieces of a log as events, whose ids are the places behind them: `ATTEMPT:OFFSET`."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, chunk: LogChunk) -> str:
        """Returns a piece as an event. A character whose last bytes are missing belongs to the next piece."""
        attempt, offset = chunk.end
        text = self._decoder.decode(chunk.content, final=offset == 0)  # the attempt before it is over
        undecoded = len(self._decoder.getstate()[0])
        return server_sent_event("log", {"text": text}, f"{attempt}:{offset - undecoded}")


async def lines(chunks: AsyncGenerator[LogChunk]) -> AsyncIterator[bytes]:
    """Yields a log; an error after its begin becomes its last line."""
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk.content
        except TrainerError as error:
            yield f"error: {error}\n".encode()
