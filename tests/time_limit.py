"""Fails a test that hangs: otherwise it would take the process, and with it the tests that follow."""

import faulthandler
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

AGAIN_S = 60.0
"""A hanging test may hang again in its teardown, for example where a pool waits for its threads."""


class TimeLimit:
    """A plugin of pytest that limits the time of each setup, call and teardown.

    Args:
        seconds: limit of most tests.
        long_seconds: limit of tests that are marked `minutes` or `installs`.
    """

    def __init__(self, seconds: float, long_seconds: float) -> None:
        self._seconds = seconds
        self._long_seconds = long_seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        with at_most(self._limit_of(item)):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        with at_most(self._limit_of(item)):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        with at_most(self._limit_of(item)):
            return (yield)

    def _limit_of(self, item: pytest.Item) -> float:
        is_long = any(map(item.get_closest_marker, ("minutes", "installs")))
        return self._long_seconds if is_long else self._seconds


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Context that fails the test if it takes longer, wherever Python's main thread waits.

    Ends the process where that thread is in C code, to which signals mean nothing; pytest-xdist starts another one.
    """

    def fail(number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        pytest.fail(f"hangs: it has taken {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, fail)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    faulthandler.dump_traceback_later(seconds + 2 * AGAIN_S, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
