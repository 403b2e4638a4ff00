"""The rate limiter: how many instances compute at once, and whose turn it is."""

import threading
import time
from collections.abc import Callable

import pytest

from serving.errors import DeadlineExceeded, LoadError, ServingError
from serving.inference.batcher import Batcher
from serving.inference.rate_limiter import RateLimiter, Resource, Turn, parse_resource
from serving.inference.request_queue import BatchLimits
from serving.observability.statistics import Statistics
from tests.serving.inference.test_batcher import TIMEOUT_S, Doubler, Request


def wait_until(happened: Callable[[], object]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.001)


class Line:
    """Instances that ask for their turns one after the other, and the order in which they get them."""

    def __init__(self, limiter: RateLimiter) -> None:
        self.limiter = limiter
        self.served: list[str] = []
        self._threads: list[threading.Thread] = []

    def ask(self, name: str, turn: Turn) -> None:
        def run() -> None:
            with turn:
                self.served.append(name)

        waiting = len(self.limiter._waiting)
        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        wait_until(lambda: len(self.limiter._waiting) > waiting or name in self.served)

    def finish(self) -> list[str]:
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        return self.served


def test_there_is_as_much_of_a_resource_as_the_neediest_instance_needs() -> None:
    limiter = RateLimiter()
    small = [limiter.register([Resource("r", 1)], None, 1) for _ in range(2)]
    large = limiter.register([Resource("r", 2)], None, 1)
    line = Line(limiter)
    with small[0]:
        line.ask("small", small[1])
        assert line.finish() == ["small"], "two of one fit into two"
        line.ask("large", large)
        assert line.served == ["small"]
    assert line.finish() == ["small", "large"]
    large.close()
    with small[0]:
        line.ask("again", small[1])
        assert line.served == ["small", "large"], "one is left"
    assert line.finish()[-1] == "again"


def test_an_instance_that_waits_is_not_overtaken_by_those_that_need_less() -> None:
    limiter = RateLimiter({("r", ""): 2})
    holder, large, small, other = (
        limiter.register([Resource(name, count)], None, 1) for name, count in (("r", 1), ("r", 2), ("r", 1), ("s", 1))
    )
    line = Line(limiter)
    with holder:
        line.ask("large", large)
        line.ask("small", small)
        line.ask("other", other)
        wait_until(lambda: line.served == ["other"])
    assert line.finish() == ["other", "large", "small"]


def test_priority_two_gets_half_the_turns_of_priority_one() -> None:
    limiter = RateLimiter()
    turns = {name: limiter.register([Resource("r", 1)], None, weight) for name, weight in (("one", 1), ("two", 2))}
    served = []
    for _ in range(30):  # both always wait
        for turn in turns.values():
            turn.start = max(limiter._now, turn.next_start)
        limiter._waiting = list(turns.values())
        limiter._grant()
        (name,) = (name for name, turn in turns.items() if turn not in limiter._waiting)
        served.append(name)
        limiter._waiting = []
        limiter._used.clear()
    assert (served.count("one"), served.count("two")) == (20, 10)


def test_devices_have_resources_of_their_own_and_global_ones_are_shared() -> None:
    limiter = RateLimiter({("r", "1"): 3, ("r", ""): 4})
    for gpu, need, limit in ((1, 4, 3), (0, 5, 4), (None, 5, 4)):
        with pytest.raises(
            LoadError, match=f"an instance needs {need} of the resource 'r', but the server has {limit}"
        ):
            limiter.register([Resource("r", need)], gpu, 1)
    first, second = (limiter.register([Resource("r", 4)], gpu, 1) for gpu in (0, 2))
    with first, second:
        pass
    shared = [limiter.register([Resource("g", 1, is_global=True)], gpu, 1) for gpu in (0, None)]
    line = Line(limiter)
    with shared[0]:
        line.ask("shared", shared[1])
        assert line.served == []
    assert line.finish() == ["shared"]


def test_two_models_take_turns_and_finish_what_waits_when_they_close() -> None:
    limiter, began = RateLimiter(), time.monotonic()
    backends = [Doubler(held=True), Doubler(held=True)]
    batchers = [
        Batcher(
            "m",
            [backend],
            BatchLimits(max_batch_size=8),
            Statistics(),
            turns=[limiter.register([Resource("r", 1)], None, 1)],
        )
        for backend in backends
    ]
    requests = [Request() for _ in range(3)]
    batchers[0].submit(requests[0])
    assert backends[0].began.acquire(timeout=TIMEOUT_S)
    batchers[1].submit(requests[1])
    wait_until(lambda: limiter._waiting)
    batchers[1].submit(requests[2])  # joins the batch that waits for its turn
    assert batchers[1].num_queued == 2
    for backend in backends:
        backend.gate.release(3)
    for batcher in batchers:
        batcher.close()
    assert [request.wait() for request in requests] == [[[2, 2]]] * 3
    assert backends[1].batches == [2]
    assert 0 < batchers[1].resource_wait_s < time.monotonic() - began
    assert limiter._turns == []
    assert not +limiter._used


def test_an_instance_that_returns_while_its_requests_are_answered_keeps_its_next_turn() -> None:
    class Answered(Request):
        """The instance has taken its next batch before the watchdog goes on."""

        def fail(self, error: ServingError) -> None:
            backend.gate.release()
            wait_until(lambda: batcher.num_hung == 0)
            batcher.submit(following)
            assert backend.began.acquire(timeout=TIMEOUT_S)
            super().fail(error)

    limiter, backend, following = RateLimiter(), Doubler(held=True), Request()
    limits = BatchLimits(max_batch_size=8, batch_timeout_s=0.3)
    batcher = Batcher("m", [backend], limits, Statistics(), turns=[limiter.register([Resource("r", 1)], None, 1)])
    batcher.submit(late := Answered())
    assert backend.began.acquire(timeout=TIMEOUT_S)
    assert isinstance(late.wait(), DeadlineExceeded)
    time.sleep(0.05)
    assert +limiter._used == {("r", "cpu"): 1}
    backend.gate.release()
    assert following.wait() == [[2, 2]]
    batcher.close()


def test_an_instance_that_hangs_keeps_no_resources() -> None:
    limiter = RateLimiter()
    backends = [Doubler(held=True), Doubler()]
    hanging, other = (
        Batcher(
            "m",
            [backend],
            BatchLimits(max_batch_size=8, batch_timeout_s=limit_s),
            Statistics(),
            turns=[limiter.register([Resource("r", 1)], None, 1)],
        )
        for backend, limit_s in zip(backends, (0.05, 0), strict=True)
    )
    late, request = Request(), Request()
    hanging.submit(late)
    assert isinstance(late.wait(), DeadlineExceeded)
    other.submit(request)
    assert request.wait() == [[2, 2]]
    backends[0].gate.release()
    hanging.close()
    other.close()
    assert not +limiter._used


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r:3", (("r", ""), 3)),
        ("r:3:1", (("r", "1"), 3)),
        ("r:3:cpu", (("r", "cpu"), 3)),
        ("r", None),
        (":3", None),
        ("r:x", None),
        ("r:-1", None),
        ("r:3:gpu", None),
    ],
)
def test_a_resource_on_the_command_line(text: str, expected: object) -> None:
    assert parse_resource(text) == expected
