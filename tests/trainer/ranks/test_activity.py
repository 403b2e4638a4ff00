"""Time limits for ranks that wait for each other. test_world.py has real processes."""

import math

from trainer.ranks.activity import SLOW_PHASE_TIMEOUT_S, Activity


def test_the_timeout_of_a_slow_phase_lasts_until_the_end_of_the_next_collective() -> None:
    """The others begin to wait during the phase, and go on while this rank computes what it sends them."""
    activity = Activity()
    activity.timeout_s = 9.0
    for _ in range(2):
        with activity.slow_phase(), activity.collective():
            assert activity.timeout_s == SLOW_PHASE_TIMEOUT_S
        assert activity.timeout_s == SLOW_PHASE_TIMEOUT_S
    with activity.collective():
        assert activity.timeout_s == SLOW_PHASE_TIMEOUT_S
    assert activity.timeout_s == 9.0


def test_a_new_timeout_takes_effect_at_once_and_stays() -> None:
    activity = Activity()
    activity.timeout_s = 9.0
    with activity.slow_phase():
        pass
    activity.timeout_s = 60.0
    with activity.collective():
        pass
    assert activity.timeout_s == 60.0


def test_the_hang_timeout_is_the_shortest_and_zero_is_none() -> None:
    activity = Activity(hang_timeout_s=1000.0)
    assert activity.timeout_s == 1000.0
    activity.timeout_s = 3.0
    assert activity.timeout_s == 1000.0
    assert Activity(hang_timeout_s=0).timeout_s == math.inf
