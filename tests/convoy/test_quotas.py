"""Token buckets: bursts, rates, debts, and concurrent callers."""

import threading

import pytest

from convoy.quotas import BURST_S, Quota


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admitted(quota: Quota, num_bytes: int = 0) -> int:
    """Takes requests until one is refused; returns the number of those that were not."""
    number = 0
    while quota.take(num_bytes) == 0:
        number += 1
    return number


def test_a_burst_then_the_rate(clock: Clock) -> None:
    quota = Quota(128, None, clock)
    assert admitted(quota) == 128 * BURST_S + 1
    clock.now += 0.5
    assert admitted(quota) == 64
    clock.now += 1000
    assert admitted(quota) == 128 * BURST_S + 1


def test_a_request_is_admitted_after_the_time_that_the_refusal_names(clock: Clock) -> None:
    quota = Quota(8, None, clock)
    admitted(quota)
    wait_s = quota.take(1)
    assert 0 < wait_s <= 1 / 8
    assert quota.take(1) == wait_s  # a refusal takes nothing
    clock.now += wait_s
    assert quota.take(1) == 0


def test_less_than_one_request_a_second(clock: Clock) -> None:
    quota = Quota(0.25, None, clock)
    assert quota.take(0) == 0
    assert quota.take(0) == 3
    clock.now += 3
    assert quota.take(0) == 0
    assert quota.take(0) == 4


def test_bytes_are_limited_and_a_large_message_leaves_a_debt(clock: Clock) -> None:
    quota = Quota(None, 1024, clock)
    assert admitted(quota, 256) == 5
    clock.now += 10
    assert quota.take(10 * 1024) == 0
    assert quota.take(0) == 9
    clock.now += 9
    assert quota.take(0) == 0


def test_both_limits_hold(clock: Clock) -> None:
    quota = Quota(4, 1024, clock)
    assert admitted(quota, 1) == 5
    clock.now += 10
    assert quota.take(2048) == 0
    assert quota.take(0) == 1


def test_bytes_that_are_counted_late_leave_a_debt(clock: Clock) -> None:
    quota = Quota(None, 1024, clock)
    assert quota.take(0) == 0
    quota.take_more(3 * 1024)
    assert quota.take(0) == 2


def test_concurrent_callers_share_it() -> None:
    quota = Quota(100, None, Clock())
    totals: list[int] = []
    threads = [threading.Thread(target=lambda: totals.append(admitted(quota))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(totals) in (100, 101)  # 100 sums of 0.01 are not exactly 1
