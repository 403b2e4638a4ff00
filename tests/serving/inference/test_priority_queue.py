"""Queues with priorities: order, bounds of each level, and what becomes of requests that wait too long."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import DeadlineExceeded, ResourceExhausted
from serving.inference import priority_queue
from serving.inference.priority_queue import PriorityQueue
from serving.inference.queue_policy import QueuePolicies, QueuePolicy
from serving.inference.request_queue import BatchLimits, RequestQueue
from tests.serving.inference.test_batcher import Doubler, Harness, Request

ROOM = QueuePolicy(max_queue_size=100)


class Prior(Request):
    """A request of a priority."""

    __slots__ = ("_level", "_wait_us")

    def __init__(self, level: int, rows: int = 1, *, wait_us: int = 0, waited_us: int = 0, **options: object) -> None:
        super().__init__((level,) * rows, **options)  # type: ignore[arg-type]
        self._level, self._wait_us = level, wait_us
        self.arrived_ns -= 1000 * waited_us

    @property
    def level(self) -> int:
        return self._level

    @property
    def wait_us(self) -> int:
        return self._wait_us


def queue_of(*levels: QueuePolicy, max_rows: int = 4) -> PriorityQueue:
    return PriorityQueue(BatchLimits(max_batch_size=max_rows, policies=QueuePolicies(levels)))


def put(queue: RequestQueue, *requests: Prior) -> None:
    for request in requests:
        assert queue.add(request)


def test_higher_levels_go_first_and_each_in_its_order() -> None:
    queue = queue_of(ROOM, ROOM, ROOM)
    low, high, middle, second = Prior(2), Prior(0, 2), Prior(1), Prior(0)
    put(queue, low, high, middle, second)
    assert queue.oldest_ns() == low.arrived_ns
    assert queue.take_batch() == ([high, second, middle], [])
    assert queue.take_batch() == ([low], [])
    assert (queue.num_rows, len(queue.requests)) == (0, 0)


def test_a_request_that_does_not_fit_is_not_overtaken_by_lower_ones() -> None:
    queue = queue_of(ROOM, ROOM)
    first, large, low, wide = Prior(0, 2), Prior(0, 3), Prior(1), Prior(0, width=3)
    put(queue, first, large, low, wide)
    assert [queue.take_batch()[0] for _ in range(4)] == [[first], [large], [wide], [low]]


def test_each_level_has_its_own_bound() -> None:
    queue = queue_of(QueuePolicy(max_queue_size=1), QueuePolicy(max_queue_size=2))
    put(queue, Prior(1), Prior(1), Prior(0))
    assert not queue.add(Prior(0))
    assert not queue.add(Prior(1))


def test_bytes_of_low_levels_leave_room_for_higher_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority_queue, "MAX_QUEUED_BYTES", 10)
    queue = queue_of(ROOM, ROOM)
    put(queue, *(Prior(1) for _ in range(6)))  # the last one exceeds 10 bytes
    assert not queue.add(Prior(1))
    put(queue, *(Prior(0) for _ in range(2)))
    assert not queue.add(Prior(0)), "and the bound of the highest is one and a half times as large"


def test_a_request_that_waited_too_long_is_refused_or_delayed_behind_its_level() -> None:
    refuses, delays = ROOM, QueuePolicy(max_queue_size=100, delays=True)
    queue = queue_of(refuses, delays, refuses, max_rows=8)
    late = Prior(0, wait_us=10, waited_us=20)
    slow, slower = (Prior(1, wait_us=10, waited_us=20) for _ in range(2))
    first, second = (Prior(1, wait_us=10**9, waited_us=10**8) for _ in range(2))
    put(queue, late, slow, first, slower, second, low := Prior(2))
    assert queue.take_batch() == ([first, second, slow, slower, low], [late])


def test_a_low_priority_is_refused_in_time_while_higher_ones_fill_each_batch() -> None:
    queue = queue_of(ROOM, ROOM, max_rows=1)
    late, ended, high = Prior(1, wait_us=10, waited_us=20), Prior(1, deadline=time.monotonic() - 1), Prior(0)
    put(queue, late, ended, Prior(1), high, Prior(0))
    assert queue.take_batch() == ([high], [late, ended])


def test_a_deadline_ends_a_delayed_request_too() -> None:
    queue = queue_of(QueuePolicy(max_queue_size=100, delays=True), max_rows=1)
    put(queue, Prior(0, wait_us=1, waited_us=5, deadline=time.monotonic() + 0.05), Prior(0), Prior(0))
    assert [len(part) for part in queue.take_batch()] == [1, 0]
    time.sleep(0.06)
    assert [len(part) for part in queue.take_batch()] == [1, 0]
    assert [len(part) for part in queue.take_batch()] == [0, 1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.sampled_from(["stays", "leaves"]))))
def test_rows_and_bytes_are_those_of_the_requests_that_wait(entries: list[tuple[int, int, str]]) -> None:
    check_counts(queue_of(ROOM, QueuePolicy(max_queue_size=100, delays=True), ROOM), entries)
    check_counts(RequestQueue(BatchLimits(max_batch_size=4, timeout_us=2)), entries)


def check_counts(queue: RequestQueue, entries: list[tuple[int, int, str]]) -> None:
    requests = [Prior(level, rows, wait_us=1, waited_us=5 * (rows % 2)) for level, rows, _ in entries]
    put(queue, *requests)
    for request, (_, _, fate) in zip(requests, entries, strict=True):
        if fate == "leaves":
            assert queue.remove(request)
            assert not queue.remove(request)
    waiting = list(queue.requests)
    assert queue.num_rows == sum(request.rows for request in waiting)
    left = {id(request) for request in waiting}
    assert queue._num_bytes == sum(request.num_bytes for request in waiting)
    while queue.requests:
        taken, expired = queue.take_batch()
        assert taken or expired
        left -= {id(request) for request in (*taken, *expired)}
    assert (left, queue.num_rows, queue._num_bytes) == (set(), 0, 0)
    put(queue, *requests)
    gone = {id(request) for part in queue.take_batch() for request in part}  # and others are delayed
    assert queue.clear() == [request for request in requests if id(request) not in gone]
    assert (queue.num_rows, queue._num_bytes, queue.take_batch()) == (0, 0, ([], []))


def test_the_batcher_serves_priorities() -> None:
    policies = QueuePolicies((QueuePolicy(max_queue_size=1), ROOM))
    made = Harness(Doubler(held=True), max_batch_size=1, policies=policies)  # type: ignore[arg-type]
    try:
        made.occupy()
        requests = [Prior(1), Prior(1, wait_us=1), Prior(0)]
        for request in requests:
            made.batcher.submit(request)
        with pytest.raises(ResourceExhausted, match="the queue of model 'm' is full: 3 requests wait"):
            made.batcher.submit(Prior(0))
        assert made.batcher.oldest_age_s() > 0
        made.backends[0].gate.release(2)
        assert requests[2].wait() == [[0, 0]]
        assert requests[0].result is None
        made.backends[0].gate.release(1)
        assert requests[0].wait() == [[2, 2]]
        assert isinstance(requests[1].wait(), DeadlineExceeded)
    finally:
        made.close()
