"""Streams whose items may be a long time in coming."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def with_pauses(
    items: AsyncGenerator[T], every_s: float | None = None, *, until: "asyncio.Future[Any] | None" = None
) -> AsyncGenerator[T | None]:
    """Yields the items, and None whenever there was none for some time.

    Args:
        every_s: that time; None to wait for ever.
        until: ends the stream when it is done.
    """
    end = object()
    waiting = asyncio.ensure_future(anext(items, end))
    try:
        while True:
            awaited = {waiting} if until is None else {waiting, until}
            done, _ = await asyncio.wait(awaited, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
            if until in done:
                return
            if waiting not in done:
                yield None
                continue
            item = waiting.result()
            if item is end:
                return
            yield item  # type: ignore[misc]  # not the end
            waiting = asyncio.ensure_future(anext(items, end))
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError, Exception):  # the generator must not run when it is closed
            await waiting
