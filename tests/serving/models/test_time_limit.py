"""A load gives up on a backend that hangs, and on nothing else."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from serving.errors import LoadError
from serving.models.time_limit import call_with_limit, open_with_limit
from tests.serving.models.recording_backend import RecordingBackend, double, make_spec

ROWS = [np.ones((1, 2), np.float32)]


def test_a_run_that_hangs_ends_the_call() -> None:
    free = threading.Event()

    def hang(x: np.ndarray) -> list[np.ndarray]:
        free.wait(30)
        return [x]

    backend = RecordingBackend(make_spec(), hang)
    began = time.monotonic()
    with pytest.raises(LoadError, match=r"the model hangs: it did not finish a batch within 0\.1 s while"):
        call_with_limit(lambda backends: backends[0].run(ROWS), [backend], 0.1)
    assert time.monotonic() - began < 5
    free.set()


@pytest.mark.parametrize("limit_s", [0, 0.5])
def test_many_short_runs_may_take_longer_than_the_limit(limit_s: float) -> None:
    backend = RecordingBackend(make_spec(), double)

    def check(backends) -> int:
        for _ in range(6):
            backends[0].run(ROWS)
            time.sleep(0.1)
        return 7

    assert call_with_limit(check, [backend], limit_s) == 7


def test_errors_are_raised() -> None:
    def fails(x: np.ndarray) -> list[np.ndarray]:
        raise SystemExit(3)

    backend = RecordingBackend(make_spec(), fails)
    with pytest.raises(SystemExit):
        call_with_limit(lambda backends: backends[0].run(ROWS), [backend], 5)


def test_a_backend_that_hangs_while_it_opens_is_left_behind_and_closed_when_it_returns():
    go_on, closed = threading.Event(), threading.Event()

    def open_all():
        go_on.wait(60)
        return [SimpleNamespace(close=closed.set)]

    with pytest.raises(LoadError, match=r"the model hangs: its backend did not open it within 0\.05 s"):
        open_with_limit(open_all, 0.05)
    go_on.set()
    assert closed.wait(60)


def test_what_opens_in_time_is_returned_and_errors_pass():
    assert open_with_limit(lambda: [], 5) == []
    with pytest.raises(ZeroDivisionError):
        open_with_limit(lambda: 1 / 0, 5)
