"""The queue of a model whose configuration has priorities, or policies that delay requests or let them set a time-out.

Triton's scheduling: levels are served strictly in their order, each first in, first out. A request that has waited too
long is refused, or delayed until none of its level is left that has time
(https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto, message ModelQueuePolicy).
Times are looked at when a batch is formed.
"""

import time
from collections import OrderedDict, deque

from serving.inference.batch import QueuedRequest, fit_together
from serving.inference.queue_policy import QueuePolicy
from serving.inference.request_queue import MAX_QUEUED_BYTES, BatchLimits, RequestQueue


class _Level:
    """The requests of one priority, oldest first.

    Args:
        max_bytes: input bytes that wait in all levels, above which this one takes no more requests.
    """

    def __init__(self, policy: QueuePolicy, max_bytes: int) -> None:
        self.policy = policy
        self.max_bytes = max_bytes
        self.in_time: deque[QueuedRequest] = deque()
        self.delayed: deque[QueuedRequest] = deque()

    def __len__(self) -> int:
        return len(self.in_time) + len(self.delayed)

    def remove(self, request: QueuedRequest) -> None:
        (self.in_time if request in self.in_time else self.delayed).remove(request)


class _Batch:
    """A batch that is being filled.

    Attributes:
        expired: requests that are refused.
        is_full: the next request would not fit.
    """

    def __init__(self, room: int) -> None:
        self.requests: list[QueuedRequest] = []
        self.expired: list[QueuedRequest] = []
        self.is_full = False
        self._room = room
        self._now = time.monotonic()
        self._now_ns = time.monotonic_ns()

    def fill(self, level: _Level) -> None:
        """Takes the requests of a level, as far as they fit."""
        self._move_overdue(level)
        while level.in_time and not self.is_full:
            self._take_first(level.in_time)
            self._move_overdue(level)
        while level.delayed and not self.is_full:
            self._take_first(level.delayed)

    def _move_overdue(self, level: _Level) -> None:
        """Refuses or delays the first requests of a level, as long as their time is up.

        Also where the batch is full, or requests of a low priority would learn nothing while higher ones keep coming.
        """
        while level.in_time and self._is_overdue(level.in_time[0]):
            request = level.in_time.popleft()
            is_late = request.deadline is not None and request.deadline <= self._now
            (level.delayed if level.policy.delays and not is_late else self.expired).append(request)

    def _is_overdue(self, request: QueuedRequest) -> bool:
        if request.deadline is not None and request.deadline <= self._now:
            return True
        return bool(request.wait_us) and self._now_ns - request.queued_ns >= 1000 * request.wait_us

    def _take_first(self, waiting: deque[QueuedRequest]) -> None:
        request = waiting[0]
        if request.deadline is not None and request.deadline <= self._now:
            self.expired.append(waiting.popleft())
            return
        taken = self.requests
        if taken and (request.rows > self._room or not fit_together(taken[0].shapes, request.shapes)):
            self.is_full = True
            return
        taken.append(waiting.popleft())
        self._room -= request.rows
        self.is_full = self._room <= 0


class PriorityQueue(RequestQueue):
    """A bounded queue of several levels. Not thread-safe.

    The bytes of all levels together are bounded: the lowest is open up to the bound of a model, the highest up to
    nearly twice as many, so that a flood of requests of low priority does not shut out those of higher ones.
    """

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        assert limits.policies is not None
        levels = limits.policies.levels
        self._levels = [
            _Level(policy, MAX_QUEUED_BYTES + MAX_QUEUED_BYTES * (len(levels) - 1 - place) // len(levels))
            for place, policy in enumerate(levels)
        ]
        self._by_arrival: OrderedDict[QueuedRequest, None] = OrderedDict()
        self.requests = self._by_arrival

    def oldest_ns(self) -> int:
        return next(iter(self._by_arrival)).queued_ns

    def add(self, request: QueuedRequest) -> bool:
        level = self._levels[request.level]
        if len(level) >= level.policy.max_queue_size or self._num_bytes > level.max_bytes:
            return False
        level.in_time.append(request)
        self._by_arrival[request] = None
        self.num_rows += request.rows
        self._num_bytes += request.num_bytes
        return True

    def remove(self, request: QueuedRequest) -> bool:
        if request not in self._by_arrival:
            return False
        self._levels[request.level].remove(request)
        self._forget([request])
        return True

    def clear(self) -> list[QueuedRequest]:
        waiting = list(self._by_arrival)
        self._forget(waiting)
        for level in self._levels:
            level.in_time.clear()
            level.delayed.clear()
        return waiting

    def take_batch(self) -> tuple[list[QueuedRequest], list[QueuedRequest]]:
        batch = _Batch(self.max_rows)
        for level in self._levels:
            batch.fill(level)
        self._forget(batch.requests)
        self._forget(batch.expired)
        return batch.requests, batch.expired

    def _forget(self, requests: list[QueuedRequest]) -> None:
        for request in requests:
            del self._by_arrival[request]
            self.num_rows -= request.rows
            self._num_bytes -= request.num_bytes
