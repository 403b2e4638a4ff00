"""Time limits for ranks that wait for each other. test_world.py has real processes."""

import math

from trainer.ranks.failure import FailureContext
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
