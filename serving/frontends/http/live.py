"""`GET /web/api/events`: what the server does at this moment, as server-sent events, for the page's section Serve.

Batches are observed while somebody watches, and at no other time: a batcher without a watcher tests one attribute a
batch. Nothing waits for a browser: what it does not take in time is left out and counted.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from convoy.auth import TokenFile
from convoy.http_server import server_sent_event
from serving.errors import ResourceExhausted
from serving.inference.batch import ComputedBatch
from serving.models.repository import Model, Repository
from serving.observability.statistics import LATENCY_BOUNDS_S

MAX_VIEWERS = 16
TICK_S = 0.1
FIGURES_EVERY = 10
"""Ticks between two events with figures."""
MAX_BATCHES = 64
"""In one event."""
MAX_REQUESTS = 32
"""Of one batch that are listed."""

_MEDIA_TYPE = "text/event-stream"
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

Batch = dict[str, Any]


class LiveEvents:
    """The endpoint, and the batches that its viewers have not seen.

    Args:
        is_ending: whether the server drains or stops: streams end, so that it need not wait for them.
        tokens: of which viewers must send one; the stream of one that is revoked ends. None for no authentication.
    """

    def __init__(self, repository: Repository, is_ending: Callable[[], bool], tokens: TokenFile | None) -> None:
        self._repository = repository
        self._is_ending = is_ending
        self._tokens = tokens
        self._viewers: list[_Viewer] = []

    async def page_events(self, request: Request) -> Response:
        """Answers with a stream that ends when the viewer leaves, its token is revoked, or the server stops."""
        if request.method == "HEAD":
            return Response(headers=_HEADERS, media_type=_MEDIA_TYPE)
        if len(self._viewers) >= MAX_VIEWERS:
            raise ResourceExhausted(f"{MAX_VIEWERS} pages watch this server already", retry_after_ms=5000)
        viewer = _Viewer()
        self._viewers.append(viewer)
        stream = self._stream(viewer, request.headers.get("authorization"))
        return _Events(stream, on_end=lambda: self._forget(viewer))

    async def _stream(self, viewer: "_Viewer", credentials: str | None) -> AsyncIterator[str]:
        with nullcontext() if self._tokens is None else self._tokens.watch(credentials, viewer.leave):
            yield server_sent_event("hello", {"latency_bounds_s": LATENCY_BOUNDS_S})
            tick = 0
            while not (viewer.has_left or self._is_ending()):
                self._watch()
                for text in self._news(viewer, is_turn=tick % FIGURES_EVERY == 0):
                    yield text
                tick += 1
                await asyncio.sleep(TICK_S)

    def _forget(self, viewer: "_Viewer") -> None:
        self._viewers.remove(viewer)
        self._watch()

    def _news(self, viewer: "_Viewer", *, is_turn: bool) -> list[str]:
        """Returns the events since the last tick.

        Args:
            is_turn: of the figures.
        """
        events = []
        if viewer.generation != self._repository.generation:
            viewer.generation = self._repository.generation
            events.append(server_sent_event("models", {"generation": viewer.generation}))
        if viewer.batches:
            events.append(server_sent_event("batches", viewer.take()))
        if is_turn:
            events.append(server_sent_event("figures", [_figures(model) for model in self._repository.ready_models()]))
        return events

    def _watch(self) -> None:
        """Observes the batches of all models if there is a viewer, and else of none."""
        for model in self._repository.ready_models():
            if not self._viewers:
                model.batcher.watch = None
            elif model.batcher.watch is None:
                model.batcher.watch = _observer(model, self._viewers)


class _Events(StreamingResponse):
    """A stream of events.

    Args:
        on_end: is called once, also if the stream has not begun when its viewer leaves.
    """

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type=_MEDIA_TYPE, headers=_HEADERS)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


class _Viewer:
    """What one page has not been sent yet. A batcher's thread adds, the event loop takes."""

    def __init__(self) -> None:
        self.has_left = False
        self.generation = -1
        self.batches: deque[Batch] = deque(maxlen=MAX_BATCHES)
        self.num_added = 0

    def leave(self) -> None:
        """Ends the stream soon; on any thread."""
        self.has_left = True

    def add(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.num_added += 1

    def take(self) -> dict[str, Any]:
        """Returns the newest batches, and how many of them have been left out."""
        added, self.num_added = self.num_added, 0
        taken = [self.batches.popleft() for _ in range(len(self.batches))]
        return {"batches": taken, "left_out": max(0, added - len(taken))}


def _observer(model: Model, viewers: list[_Viewer]) -> Callable[[ComputedBatch, int], None]:
    def observe(batch: ComputedBatch, answered_ns: int) -> None:
        closed_ns = batch.times_ns[0]
        described = {
            "model": model.spec.name,
            "version": model.version,
            "rows": batch.rows,
            "closed": batch.trigger,
            "num_requests": len(batch.requests),
            "requests": [
                [request.rows, (closed_ns - request.queued_ns) // 1000] for request in batch.requests[:MAX_REQUESTS]
            ],
            "compute_us": (batch.times_ns[2] - closed_ns) // 1000,
            "answer_us": (answered_ns - batch.times_ns[2]) // 1000,
        }
        for viewer in viewers.copy():
            viewer.add(described)

    return observe


def _figures(model: Model) -> dict[str, Any]:
    """Returns counters of a version since it was loaded, and the state of its queue."""
    stats = model.statistics.snapshot()
    batcher = model.batcher
    return {
        "model": model.spec.name,
        "version": model.version,
        "time": time.monotonic(),
        "success": stats.success.count,
        "failures": stats.failures,
        "rows": stats.inference_count,
        "batches": stats.execution_count,
        "busy_s": stats.compute_infer.ns * 1e-9 if stats.execution_count else 0.0,
        "latencies": stats.latency_counts,
        "latency_s": stats.success.ns * 1e-9,
        "batch_sizes": {rows: durations.count for rows, durations in sorted(stats.batch_sizes.items())},
        "queued": batcher.num_queued,
        "queued_rows": batcher.num_queued_rows,
        "oldest_s": batcher.oldest_age_s(),
        "running": batcher.num_running,
    }
