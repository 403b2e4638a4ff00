"""The requests that wait for one model version, counted by rows and bytes, and the batches that they form."""

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from serving.inference.batch import QueuedRequest, fit_together
from serving.inference.queue_policy import QueuePolicies

MAX_QUEUED_BYTES = 256 << 20
"""Input bytes that may wait for one model version. One request may exceed it, so that every size is accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Sizes of batches and of the queue.

    Args:
        max_batch_size: rows; 0 for a model without a batch dimension, which computes one request at a time.
        target_batch_size: rows up to which a batch is filled; a larger request forms a batch of its own. 0 for
            `max_batch_size`.
        max_queue_delay_us: how long the oldest request may wait for others while an instance is free.
        max_queue_size: number of requests that may wait.
        timeout_us: how long a request may wait; 0 for no limit.
        policies: of the levels of priority; None for a queue of one level, which refuses what waits too long.
        batch_timeout_s: how long a batch may be computed until its instance counts as hung; 0 for no limit.
    """

    max_batch_size: int
    target_batch_size: int = 0
    max_queue_delay_us: int = 0
    max_queue_size: int = 1024
    timeout_us: int = 0
    policies: QueuePolicies | None = None
    batch_timeout_s: float = 0


class RequestQueue:
    """A bounded queue, oldest request first. Not thread-safe.

    Attributes:
        requests: that wait, by arrival.
        num_rows: of the requests that wait.
        max_rows: up to which a batch is filled.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.requests: Collection[QueuedRequest]
        self.requests = self._waiting = deque[QueuedRequest]()
        self.num_rows = 0
        self.max_rows = limits.target_batch_size or max(1, limits.max_batch_size)
        self._limits = limits
        self._num_bytes = 0

    def oldest_ns(self) -> int:
        """Returns when the oldest request was queued; there must be one."""
        return self._waiting[0].queued_ns

    def add(self, request: QueuedRequest) -> bool:
        """Adds a request. Returns False if the queue is full."""
        if len(self._waiting) >= self._limits.max_queue_size or self._num_bytes > MAX_QUEUED_BYTES:
            return False
        self._waiting.append(request)
        self.num_rows += request.rows
        self._num_bytes += request.num_bytes
        return True

    def remove(self, request: QueuedRequest) -> bool:
        """Removes a request. Returns False if it does not wait."""
        try:
            self._waiting.remove(request)
        except ValueError:
            return False
        self.num_rows -= request.rows
        self._num_bytes -= request.num_bytes
        return True

    def clear(self) -> list[QueuedRequest]:
        """Removes all requests, and returns them."""
        waiting = list(self._waiting)
        self._waiting.clear()
        self.num_rows = self._num_bytes = 0
        return waiting

    def take_batch(self) -> tuple[list[QueuedRequest], list[QueuedRequest]]:
        """Takes from the queue the next batch, and the requests whose time is up."""
        requests: list[QueuedRequest] = []
        expired: list[QueuedRequest] = []
        queue, room, now = self._waiting, self.max_rows, time.monotonic()
        num_rows = num_bytes = 0
        oldest_ns = time.monotonic_ns() - 1000 * self._limits.timeout_us if self._limits.timeout_us else 0
        while queue and room > 0:
            request = queue[0]
            if (request.deadline is not None and request.deadline <= now) or (
                oldest_ns and request.queued_ns < oldest_ns
            ):
                expired.append(request)
            elif requests and (request.rows > room or not fit_together(requests[0].shapes, request.shapes)):
                break
            else:
                room -= request.rows
                requests.append(request)
            queue.popleft()
            num_rows += request.rows
            num_bytes += request.num_bytes
        self.num_rows -= num_rows
        self._num_bytes -= num_bytes
        return requests, expired
