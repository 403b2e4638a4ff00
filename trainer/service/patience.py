"""Followers of a job wait for a service or a store that does not answer for a while."""

import time
from collections.abc import Callable

from trainer.errors import TrainerError

ASK_EVERY_S = 1.0
GIVE_UP_S = 600.0
"""A follower gives up if it has got no answer for so long."""


def wait_for_answer(ask: Callable[[], object], kind: type[TrainerError], tell: Callable[[str], None]) -> None:
    """Returns when `ask` returns; says once that it does not.

    Args:
        kind: of the errors that mean that there is no answer.

    Raises:
        TrainerError: of that kind when it gives up, or of another one.
    """
    until, has_told = time.monotonic() + GIVE_UP_S, False
    while True:
        time.sleep(ASK_EVERY_S)
        try:
            ask()
            return
        except kind as error:
            if time.monotonic() > until:
                raise
            if not has_told:
                tell(f"{error}; trying again for {GIVE_UP_S / 60:.0f} minutes")
            has_told = True
