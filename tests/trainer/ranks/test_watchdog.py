"""Time limits for ranks that wait for each other. test_world.py has real processes."""

import math
from types import SimpleNamespace

import pytest

from trainer.ranks.failure import FailureContext
from trainer.ranks.heartbeat import Heartbeat
from trainer.ranks.watchdog import SLOW_PHASE_TIMEOUT_S, Watchdog


def test_the_timeout_of_a_slow_phase_lasts_until_the_end_of_the_next_collective() -> None:
    """The others begin to wait during the phase, and go on while this rank computes what it sends them."""
    watchdog = Watchdog(FailureContext())
    watchdog.timeout_s = 9.0
    for _ in range(2):
        with watchdog.slow_phase(), watchdog.collective():
            assert watchdog.timeout_s == SLOW_PHASE_TIMEOUT_S
        assert watchdog.timeout_s == SLOW_PHASE_TIMEOUT_S
    with watchdog.collective():
        assert watchdog.timeout_s == SLOW_PHASE_TIMEOUT_S
    assert watchdog.timeout_s == 9.0


def test_a_new_timeout_takes_effect_at_once_and_stays() -> None:
    watchdog = Watchdog(FailureContext())
    watchdog.timeout_s = 9.0
    with watchdog.slow_phase():
        pass
    watchdog.timeout_s = 60.0
    with watchdog.collective():
        pass
    assert watchdog.timeout_s == 60.0


def test_the_hang_timeout_is_the_shortest_and_zero_is_none() -> None:
    watchdog = Watchdog(FailureContext(), hang_timeout_s=1000.0)
    assert watchdog.timeout_s == 1000.0
    watchdog.timeout_s = 3.0
    assert watchdog.timeout_s == 1000.0
    assert Watchdog(FailureContext(), hang_timeout_s=0).timeout_s == math.inf


def beat(num_collectives: int, host: str) -> Heartbeat:
    return Heartbeat(
        beat=1, num_collectives=num_collectives, waited_s=0.0, timeout_s=1.0, pid=7, launcher_pid=1, host=host
    )


@pytest.mark.parametrize(
    ("rank", "peers", "text"),
    [
        (0, {1: beat(1, "a"), 2: beat(0, "b")}, "rank 0 waits for rank 2 (process 7 on b)"),
        (0, {2: beat(1, "b")}, "rank 0 waits for rank 1"),  # it has sent no heartbeat yet
        (1, {0: beat(1, "a")}, ""),  # rank 0 waits, too, and says so
        (1, {0: beat(0, "a"), 2: beat(1, "a")}, "rank 1 waits for rank 0 (process 7 on a)"),
        (2, {0: beat(0, "a")}, "rank 2 waits for rank 0 (process 7 on a) and rank 1"),
    ],
)
def test_the_lowest_rank_that_waits_names_the_others(rank: int, peers: dict[int, Heartbeat], text: str) -> None:
    watchdog = Watchdog(FailureContext(rank=rank, world_size=3))
    watchdog._heartbeats = SimpleNamespace(peers=peers)  # type: ignore[assignment]
    with watchdog.collective():
        assert watchdog.describe_wait() == text


def test_ranks_that_have_all_arrived_wait_for_the_network() -> None:
    watchdog = Watchdog(FailureContext(rank=0, world_size=2))
    watchdog._heartbeats = SimpleNamespace(peers={1: beat(1, "b")})  # type: ignore[assignment]
    with watchdog.collective():
        assert watchdog.describe_wait().startswith("all 2 ranks wait for their connections to each other, on ")


def test_of_many_ranks_a_few_are_named() -> None:
    assert Watchdog(FailureContext()).describe(range(1, 100)).endswith("rank 8 and 91 more")
