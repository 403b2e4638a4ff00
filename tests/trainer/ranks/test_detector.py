"""The failure detector names the right rank for given heartbeats. test_world.py has real processes."""

import math
from typing import Any

import pytest

from trainer.ranks.detector import (
    GRACE_S,
    RankObservations,
    Suspicion,
    describe_ranks,
    describe_wait,
    suspect_peers,
    suspect_self,
)
from trainer.ranks.heartbeat import Heartbeat

TIMEOUT_S = 5.0
LATE_S = TIMEOUT_S + GRACE_S + 0.1


def state(num_collectives: int, waited_s: float | None = None, *, timeout_s: float = TIMEOUT_S) -> Heartbeat:
    return Heartbeat(1, num_collectives, waited_s, timeout_s, pid=7, launcher_pid=1, host="x")


def observed(own: Heartbeat, *peers: Heartbeat, **more: Any) -> RankObservations:
    """Returns rank 0's observations; the peers are ranks 1, 2, …"""
    known = {"silent": [], "stale": [], "store_age_s": 0.0} | more
    return RankObservations(rank=0, own=own, peers=dict(enumerate(peers, start=1)), **known)


def hangs(seen: RankObservations, *, idle_s: float = 0.0, idle_timeout_s: float = TIMEOUT_S) -> bool:
    return suspect_self(seen, idle_s=idle_s, idle_timeout_s=idle_timeout_s) is not None


def test_a_rank_hangs_when_another_has_waited_too_long_for_it() -> None:
    assert suspect_self(observed(state(3), state(4, 5.4)), idle_s=0.0, idle_timeout_s=5.0) == Suspicion(
        [0], "rank 0 hangs: the others have waited 5 s for it"
    )
    assert not hangs(observed(state(3), state(4, 4.9)))
    assert not hangs(observed(state(3, timeout_s=600.0), state(4, 5.4)))  # it is in a slow phase
    assert not hangs(observed(state(3), state(4, 5.4, timeout_s=600.0)))
    assert not hangs(observed(state(4), state(4, 5.4)))  # the other waits for a third rank
    assert not hangs(observed(state(3, 5.0), state(4, 5.4)))  # this one waits itself
    assert not hangs(observed(state(3), state(4)))


def test_a_rank_that_should_compute_hangs_when_it_is_idle() -> None:
    waiting = observed(state(3, timeout_s=600.0), state(4, 6.0, timeout_s=600.0))
    assert hangs(waiting, idle_s=5.1)
    assert not hangs(waiting, idle_s=4.9)
    assert not hangs(observed(state(3), state(4)), idle_s=60.0)  # nobody waits for it


def test_without_a_timeout_no_rank_hangs() -> None:
    own, other = state(3, timeout_s=math.inf), state(4, 1e6, timeout_s=math.inf)
    assert not hangs(observed(own, other), idle_s=1e6, idle_timeout_s=math.inf)
    assert suspect_peers(observed(other, own)) is None


def test_a_silent_rank_is_named_whatever_it_does() -> None:
    assert suspect_peers(observed(state(3), state(9, timeout_s=math.inf), state(3), silent=[1])) == Suspicion(
        [1], "rank 1 (process 7 on x) sent no heartbeat for 7 s"
    )


def test_a_stale_rank_is_named_if_others_wait_for_it() -> None:
    assert suspect_peers(observed(state(4, LATE_S), state(3), state(2), stale=[1])) == Suspicion(
        [1], "rank 1 (process 7 on x) sent no heartbeat for 4 s, and the others wait for it"
    )
    assert suspect_peers(observed(state(4), state(3), stale=[1])) is None


@pytest.mark.parametrize(("waited_s", "is_named"), [(LATE_S, True), (TIMEOUT_S + 0.1, False)])
def test_late_ranks_are_named_after_they_could_have_named_themselves(waited_s: float, is_named: bool) -> None:
    suspicion = suspect_peers(observed(state(4, waited_s), state(3), state(4, waited_s), state(2)))
    assert (suspicion is not None) is is_named
    if suspicion:
        assert suspicion.ranks == [1, 3]
        assert suspicion.message.endswith("has not joined the collective in which the others have waited for 7 s")


def test_a_late_rank_in_a_slow_phase_is_not_named() -> None:
    assert suspect_peers(observed(state(4, LATE_S), state(3, timeout_s=600.0))) is None


def test_ranks_that_wait_for_each_other_suspect_no_rank() -> None:
    waited_s = LATE_S + GRACE_S
    suspicion = suspect_peers(observed(state(4, waited_s), state(4, waited_s)))
    assert suspicion == Suspicion([], "all ranks have waited 8 s for each other: the network may be cut")
    assert suspect_peers(observed(state(4, LATE_S), state(4, LATE_S))) is None


def test_a_store_that_does_not_answer_ends_a_rank_that_waits() -> None:
    suspicion = suspect_peers(observed(state(4, LATE_S), state(3), store_age_s=4.1))
    assert suspicion == Suspicion([], "rank 0 (process 7 on x) has waited 7 s, and the run's store does not answer")
    assert suspect_peers(observed(state(4), state(3), store_age_s=60.0)) is None


def on(host: str, num_collectives: int) -> Heartbeat:
    return state(num_collectives, 0.0)._replace(host=host)


@pytest.mark.parametrize(
    ("rank", "peers", "text"),
    [
        (0, {1: on("a", 1), 2: on("b", 0)}, "rank 0 waits for rank 2 (process 7 on b)"),
        (0, {2: on("b", 1)}, "rank 0 waits for rank 1"),  # it has sent no heartbeat yet
        (1, {0: on("a", 1)}, ""),  # rank 0 waits, too, and tells the user
        (1, {0: on("a", 0), 2: on("a", 1)}, "rank 1 waits for rank 0 (process 7 on a)"),
        (2, {0: on("a", 0)}, "rank 2 waits for rank 0 (process 7 on a) and rank 1"),
        (0, {1: on("b", 1), 2: on("a", 2)}, "all 3 ranks wait for their connections to each other, on a, b, x"),
    ],
)
def test_the_lowest_rank_that_waits_names_the_others(rank: int, peers: dict[int, Heartbeat], text: str) -> None:
    assert describe_wait(rank, 3, state(1, 0.0), peers) == text


def test_of_many_ranks_a_few_are_named() -> None:
    assert describe_ranks(range(1, 100), {}).endswith("rank 8 and 91 more")
    suspicion = suspect_peers(observed(state(3), silent=list(range(1, 100))))
    assert suspicion is not None
    assert suspicion.ranks == list(range(1, 100))
    assert suspicion.message.endswith("rank 8 and 91 more sent no heartbeat for 7 s")
