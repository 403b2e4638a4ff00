"""Streams of a job: its log, and its events as server-sent events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from convoy.http_server import server_sent_event
from trainer.errors import TrainerError
from trainer.service.jobs import Event
from trainer.service.json_values import event_json
from trainer.service.logs import LogChunk
from trainer.service.pauses import with_pauses

KEEP_ALIVE_S = 15.0
"""A silent stream sends a comment so often: proxies close connections that are silent, and a dead client is noticed."""
RECONNECT_MS = 1000
"""A browser that has lost the connection waits so long before it connects again."""


async def server_sent(events: AsyncGenerator[Event]) -> AsyncIterator[str]:
    """Yields events as a browser's EventSource reads them; each has its number as id."""
    async with aclosing(events), aclosing(with_pauses(events, KEEP_ALIVE_S)) as found:
        yield f"retry: {RECONNECT_MS}\n\n"
        try:
            async for event in found:
                if event is None:
                    yield ": keep-alive\n\n"
                else:
                    yield server_sent_event(event.kind, event_json(event), event.number)
        except TrainerError as error:  # the client connects again after its last event
            yield f": {str(error).splitlines()[0]}\n\n"


async def lines(chunks: AsyncGenerator[LogChunk]) -> AsyncIterator[bytes]:
    """Yields a log; an error after its begin becomes its last line."""
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk.content
        except TrainerError as error:
            yield f"error: {error}\n".encode()
