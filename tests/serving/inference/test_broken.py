"""An instance that fails on everything, its own check included: others serve on, and it is checked again."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from serving.backends import Backend
from serving.errors import Internal, Unavailable
from serving.inference import batcher, instance
from serving.inference.batcher import Batcher, BatcherClosed
from serving.inference.instance import MAX_FAILED_BATCHES
from serving.inference.request_queue import BatchLimits
from serving.observability.statistics import Statistics
from tests.serving.inference.test_batcher import TIMEOUT_S, Doubler, Harness
from tests.serving.inference.test_hanging import wait_until

Make = Callable[..., "Checked"]


class Checked(Harness):
    """A batcher whose backends are checked by `checks`, and the health that it has reported."""

    def __init__(self, *backends: Doubler) -> None:
        self.backends = backends
        self.checked: list[Backend] = []
        self.reported: list[bool] = []
        self.statistics = Statistics()
        limits = BatchLimits(max_batch_size=1, batch_timeout_s=0.2)
        self.batcher = Batcher("m", backends, limits, self.statistics, check=self.check)
        self.batcher.on_health_change = lambda: self.reported.append(self.batcher.is_healthy)

    def check(self, backend: Backend) -> None:
        self.checked.append(backend)
        if isinstance(backend, Doubler) and backend.fails:
            raise RuntimeError(backend.fails)

    def fail(self, number: int) -> None:
        for _ in range(number):
            assert isinstance(self.submit(1).wait(), Internal)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(batcher, "_FIRST_PAUSE_S", 0.01)
    made: list[Checked] = []

    def make_one(*backends: Doubler) -> Checked:
        made.append(Checked(*backends))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def test_the_only_instance_breaks_and_recovers(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = make(Doubler(fails="no device"))
    made.fail(MAX_FAILED_BATCHES)
    wait_until(lambda: made.reported == [False])
    assert made.batcher.failure == "is broken: its batches fail, and so does its own check: no device"
    assert (made.batcher.num_broken, made.batcher.num_hung) == (1, 0)
    with pytest.raises(Unavailable, match=r"model 'm' is broken: .*: no device"):
        made.submit(1)
    wait_until(lambda: len(made.checked) > 3)
    made.backends[0].fails = ""
    wait_until(lambda: made.reported == [False, True])
    assert made.submit(4).wait() == [[8, 8]]
    assert caplog.text.count("an instance is broken: no device") == 1
    made.backends[0].fails = "no device"  # again, soon after a check that it has passed
    made.fail(MAX_FAILED_BATCHES)
    wait_until(lambda: made.reported == [False, True, False])


def test_the_other_instances_serve_on(make: Make) -> None:
    made = make(Doubler(fails="no device"), Doubler())
    until = time.monotonic() + TIMEOUT_S
    while made.batcher.num_broken == 0:
        assert time.monotonic() < until
        assert made.submit(1).wait()
    assert [made.submit(row).wait() for row in (3, 4, 5, 6)] == [[[6, 6]], [[8, 8]], [[10, 10]], [[12, 12]]]
    assert (made.batcher.is_healthy, made.reported) == (True, [])


def test_checks_that_pass_are_rare(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(batch: object) -> list[object]:
        raise ValueError("no")

    made = make(Doubler(function=refuse))
    made.fail(10 * MAX_FAILED_BATCHES)
    assert len(made.checked) == 1
    assert made.reported == []
    monkeypatch.setattr(instance, "_MIN_CHECK_PAUSE_S", 0.0)
    monkeypatch.setattr(instance, "_MAX_CHECK_PAUSE_S", 0.0)
    made.batcher._instances[0]._next_check = 0.0
    made.fail(2 * MAX_FAILED_BATCHES)
    wait_until(lambda: len(made.checked) == 3)


def fail_until_check_hangs(made: Checked, backend: Doubler) -> None:
    """Fails the batches before a check, which then waits at the backend's gate."""
    made.fail(MAX_FAILED_BATCHES - 1)
    made.batcher._instances[0]._check = lambda one: one.run([np.zeros((1, 2), np.uint8)])
    while backend.gate.acquire(blocking=False):
        pass
    backend.gate.release()  # for the batch, not for the check
    made.fail(1)


def test_a_check_that_hangs_is_found(make: Make) -> None:
    backend = Doubler(fails="no device")
    made = make(backend)
    fail_until_check_hangs(made, backend)
    wait_until(lambda: made.reported == [False])
    assert made.batcher.num_hung == 1
    backend.fails = ""
    backend.gate.release(1000)
    wait_until(lambda: made.reported == [False, True])
    assert made.submit(4).wait() == [[8, 8]]


def test_a_check_that_hangs_and_then_fails_does_not_pass(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "_FIRST_PAUSE_S", 60.0)
    backend = Doubler(fails="no device")
    made = make(backend)
    fail_until_check_hangs(made, backend)
    wait_until(lambda: made.batcher.num_hung == 1)
    backend.gate.release()
    wait_until(lambda: made.batcher.num_hung == 0)
    assert (made.batcher.num_broken, made.batcher.is_healthy) == (1, False)
    assert made.batcher.failure.endswith("so does its own check: no device")
    with pytest.raises(Unavailable):
        made.submit(1)


def test_closing_does_not_wait_for_the_next_check(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "_FIRST_PAUSE_S", 60.0)
    made = make(Doubler(fails="no device"))
    made.fail(MAX_FAILED_BATCHES)
    wait_until(lambda: made.reported == [False])
    made.batcher.close()
    assert made.backends[0].is_closed
    with pytest.raises(BatcherClosed):
        made.submit(1)
