"""The activity of this rank: the collective that it is in, and how long ranks may wait for each other.

The training reports its activity here, and the watchdog sends it to the other ranks with each heartbeat.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.ranks.procfs import IdleClock

HANG_TIMEOUT_S = 5.0
"""Least time that ranks wait for one between training steps, and longest time that one that computes may be idle."""
SLOW_PHASE_TIMEOUT_S = 600.0
"""Time that ranks wait for one that fetches data, writes a report or runs its first step."""


class Activity:
    """The activity of one rank. One thread changes it; others may read.

    Args:
        hang_timeout_s: see `HANG_TIMEOUT_S`; 0 for never, so that a debugger may stop a rank.
    """

    def __init__(self, hang_timeout_s: float = HANG_TIMEOUT_S) -> None:
        self.hang_timeout_s = hang_timeout_s if hang_timeout_s > 0 else math.inf
        self.num_collectives = 0
        """Collectives that the rank has entered since the start."""
        self.collective_error: Exception | None = None
        """The exception of the last collective that failed."""
        self.idle_clock = IdleClock()
        self._waiting_since: float | None = None
        self._is_computing = False
        self.timeout_s = SLOW_PHASE_TIMEOUT_S

    @property
    def timeout_s(self) -> float:
        """Seconds that others may wait for this rank in a collective, and that it waits for them."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._timeout_s = max(seconds, self.hang_timeout_s)
        self._timeout_after_collective_s: float | None = None

    @property
    def waited_s(self) -> float | None:
        """Seconds in the collective that the rank is in; None outside of collectives."""
        since = self._waiting_since
        return None if since is None else time.monotonic() - since

    @property
    def idle_s(self) -> float:
        """Seconds for which this process has been idle in compute-only code; 0 elsewhere."""
        return self.idle_clock.idle_s if self._is_computing else 0.0

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Context for every collective."""
        self.num_collectives += 1
        self._waiting_since = time.monotonic()
        try:
            yield
        except Exception as error:
            self.collective_error = error
            raise
        finally:
            self._waiting_since = None
            if self._timeout_after_collective_s is not None:
                self.timeout_s = self._timeout_after_collective_s

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Context for recording a CUDA graph: its collectives are not entered, and replays report none of them."""
        number = self.num_collectives
        try:
            yield
        finally:
            self.num_collectives = number

    @contextmanager
    def slow_phase(self) -> Iterator[None]:
        """Context for work that one rank does while the others wait for it, for up to `SLOW_PHASE_TIMEOUT_S`.

        The next collective restores the old timeout: by then the others have certainly received the longer one.
        """
        before = self._timeout_after_collective_s or self.timeout_s
        self.timeout_s = SLOW_PHASE_TIMEOUT_S
        is_computing, self._is_computing = self._is_computing, False
        try:
            yield
        finally:
            self.idle_clock.reset()
            self._timeout_after_collective_s, self._is_computing = before, is_computing

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context for compute-only code: an idle process counts as hung, however long the others would wait."""
        is_computing, self._is_computing = self._is_computing, True
        self.idle_clock.reset()
        try:
            yield
        finally:
            self._is_computing = is_computing
