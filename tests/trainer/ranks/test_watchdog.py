"""How patient ranks are with each other. What they notice, in real processes, is in test_distributed.py."""

from trainer.ranks.failure import FailureContext
from trainer.ranks.watchdog import PATIENT_S, Watchdog


def test_patience_lasts_until_the_others_have_heard_why() -> None:
    """They begin to wait while one writes, say, and go on while it computes what it comes with."""
    watchdog = Watchdog(FailureContext())
    watchdog.patience = 5.0
    for _ in range(2):
        with watchdog.patient(), watchdog.waiting():
            assert watchdog.patience == PATIENT_S
        assert watchdog.patience == PATIENT_S
    with watchdog.waiting():
        assert watchdog.patience == PATIENT_S
    assert watchdog.patience == 5.0


def test_a_new_patience_counts_at_once_and_stays() -> None:
    watchdog = Watchdog(FailureContext())
    watchdog.patience = 5.0
    with watchdog.patient():
        pass
    watchdog.patience = 60.0
    with watchdog.waiting():
        pass
    assert watchdog.patience == 60.0
