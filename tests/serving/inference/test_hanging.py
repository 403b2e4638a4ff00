"""A backend that hangs: its requests get an error, others are served, closing ends, and the health tells."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from serving.errors import DeadlineExceeded, Unavailable
from serving.inference.batcher import BatcherClosed
from tests.serving.inference.test_batcher import TIMEOUT_S, Doubler, Harness

LIMIT_S = 0.2


class Hanging(Harness):
    """A batcher whose batches may take 0.2 s, and the health that it has reported."""

    def __init__(self, *backends: Doubler, **limits: float) -> None:
        super().__init__(*backends, **{"max_batch_size": 1, "batch_timeout_s": LIMIT_S, **limits})  # type: ignore[arg-type]
        self.reported: list[bool] = []
        self.batcher.on_health_change = lambda: self.reported.append(self.batcher.is_healthy)


@pytest.fixture
def make() -> Iterator[type[Hanging]]:
    made: list[Hanging] = []

    def make_one(*backends: Doubler, **limits: float) -> Hanging:
        made.append(Hanging(*backends, **limits))
        return made[-1]

    yield make_one  # type: ignore[misc]
    for one in made:
        one.close()


def wait_until(condition) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_only_instance_hangs_and_recovers(make) -> None:
    made = make(Doubler(held=True))
    running, waiting = made.occupy(), made.submit(2)
    assert str(running.wait()) == "model 'm' did not finish the batch within 0.2 s"
    assert isinstance(running.result, DeadlineExceeded)
    assert isinstance(waiting.wait(), Unavailable), "retried elsewhere, it may succeed"
    wait_until(lambda: made.reported == [False])
    assert (made.batcher.num_hung, made.batcher.num_running, made.batcher.num_queued) == (1, 0, 0)
    with pytest.raises(Unavailable, match="model 'm' hangs: no instance finished its batch in time"):
        made.submit(3)
    made.backends[0].gate.release(1000)
    wait_until(lambda: made.reported == [False, True])
    assert made.submit(4).wait() == [[8, 8]]
    assert isinstance(running.result, DeadlineExceeded), "the late outputs are dropped"
    assert made.statistics.snapshot().failures == {"REJECTED": 2, "CANCELED": 0, "BACKEND": 1, "OTHER": 0}


def test_the_other_instances_serve_on(make) -> None:
    made = make(Doubler(held=True), Doubler(held=True))
    requests = [made.submit(1), made.submit(2)]
    for backend in made.backends:
        assert backend.began.acquire(timeout=TIMEOUT_S)
    made.backends[1].gate.release(1000)
    results = [request.wait() for request in requests]
    assert sum(isinstance(result, DeadlineExceeded) for result in results) == 1
    assert [made.submit(row).wait() for row in (3, 4)] == [[[6, 6]], [[8, 8]]]
    assert (made.batcher.is_healthy, made.reported) == (True, [])


def test_a_retry_that_hangs_fails_all_that_wait_for_it(make) -> None:
    """The batch fails at once; of its parts, the first one succeeds and the second one hangs."""
    hang = threading.Event()

    def poisoned(batch: np.ndarray) -> list[np.ndarray]:
        if len(batch) == 4:
            raise RuntimeError("together they fail")
        if (batch == 3).any():
            assert hang.wait(TIMEOUT_S)
        return [batch * 2]

    made = make(Doubler(held=True, function=poisoned), max_batch_size=4)
    requests = [made.occupy(), *[made.submit(row) for row in (1, 2, 3, 4)]]
    made.backends[0].gate.release(1000)
    results = [request.wait() for request in requests]
    assert results[:3] == [[[2, 2]], [[2, 2]], [[4, 4]]]
    assert all(isinstance(result, DeadlineExceeded) for result in results[3:])
    assert made.batcher.num_running == 0
    hang.set()


def test_closing_does_not_wait_for_an_instance_that_hangs(make, caplog: pytest.LogCaptureFixture) -> None:
    made = make(Doubler(held=True))
    running, waiting = made.occupy(), made.submit(2)
    began = time.monotonic()
    made.batcher.close()
    assert time.monotonic() - began < 5
    assert isinstance(running.wait(), DeadlineExceeded)
    assert isinstance(waiting.wait(), Unavailable)
    assert "model 'm': 1 instances hang and keep their threads and memory" in caplog.text
    assert not made.backends[0].is_closed, "its backend is in use"
    with pytest.raises(BatcherClosed):
        made.submit(3)
    made.backends[0].gate.release(1000)
    wait_until(lambda: made.backends[0].is_closed)


def test_without_a_limit_a_batch_may_take_any_time(make) -> None:
    made = make(Doubler(held=True), batch_timeout_s=0)
    running = made.occupy()
    assert not running.is_done.wait(3 * LIMIT_S)
    made.backends[0].gate.release(1000)
    assert running.wait() == [[2, 2]]
