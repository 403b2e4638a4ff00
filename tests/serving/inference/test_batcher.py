"""The batcher, with backends that wait until the test releases them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import DeadlineExceeded, Internal, ResourceExhausted, ServingError
from serving.inference import request_queue
from serving.inference.batch import QueuedRequest
from serving.inference.batcher import Batcher, BatcherClosed
from serving.inference.outputs import Outputs
from serving.inference.request_queue import BatchLimits, RequestQueue
from serving.observability.statistics import Statistics
from serving.protocol.tensors import DATATYPES, Array, TensorSpec

UINT8 = DATATYPES["UINT8"]
TIMEOUT_S = 30


class Doubler:
    """A backend that doubles its input. Each batch waits until the test releases `gate`."""

    uses_gpu = False
    inputs = (TensorSpec("x", UINT8, (-1, -1)),)
    outputs = (TensorSpec("y", UINT8, (-1, -1)),)

    def __init__(
        self, *, held: bool = False, fails: str = "", function: Callable[[Array], object] = lambda batch: [batch * 2]
    ) -> None:
        self.function = function
        self.batches: list[int] = []
        self.began = threading.Semaphore(0)
        self.gate = threading.Semaphore(0 if held else 1000)
        self.fails = fails
        self.is_closed = False

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.batches.append(len(inputs[0]))
        self.began.release()
        assert self.gate.acquire(timeout=TIMEOUT_S)
        if self.fails:
            raise RuntimeError(self.fails)
        return self.function(inputs[0])  # type: ignore[return-value]

    def close(self) -> None:
        self.is_closed = True


class Request(QueuedRequest):
    """A request that keeps its result."""

    __slots__ = ("is_done", "result")

    def __init__(self, rows: Sequence[int] = (1,), *, deadline: float | None = None, width: int = 2) -> None:
        array = np.array([[row] * width for row in rows], np.uint8)
        super().__init__((array.tobytes(),), (array.shape,), len(rows), deadline)
        self.result: list[list[int]] | ServingError | None = None
        self.is_done = threading.Event()

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self.result = outputs.slice(0, first_row, self.rows).tolist()
        assert outputs.data(0, first_row, self.rows) == np.array(self.result, np.uint8).tobytes()
        self.is_done.set()

    def fail(self, error: ServingError) -> None:
        self.result = error
        self.is_done.set()

    def wait(self) -> "list[list[int]] | ServingError | None":
        assert self.is_done.wait(TIMEOUT_S)
        return self.result


class Harness:
    """A batcher over backends, closed at the end of the test."""

    def __init__(self, *backends: Doubler, **limits: int) -> None:
        self.backends = backends
        self.statistics = Statistics()
        self.batcher = Batcher("m", backends, BatchLimits(**{"max_batch_size": 8, **limits}), self.statistics)

    def submit(self, *rows: int, **options: float) -> Request:
        request = Request(rows or (1,), **options)
        self.batcher.submit(request)
        return request

    def occupy(self) -> Request:
        """Submits a request that occupies the only instance until the test releases it."""
        request = self.submit(1)
        assert self.backends[0].began.acquire(timeout=TIMEOUT_S)
        return request

    def close(self) -> None:
        for backend in self.backends:
            backend.gate.release(1000)
        self.batcher.close()


@pytest.fixture
def harness(request: pytest.FixtureRequest) -> Iterator[type[Harness]]:
    made: list[Harness] = []

    def make(*backends: Doubler, **limits: int) -> Harness:
        made.append(Harness(*backends, **limits))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        one.close()


def test_a_free_instance_takes_a_request_at_once(harness) -> None:
    made = harness(Doubler())
    assert made.submit(3, 4).wait() == [[6, 6], [8, 8]]
    assert made.backends[0].batches == [2]


def test_queued_requests_share_a_batch_and_get_their_own_rows(harness) -> None:
    made = harness(Doubler(held=True))
    made.occupy()
    requests = [made.submit(*rows) for rows in ((1, 2), (3,), (4, 5, 6))]
    assert made.batcher.num_queued == 3
    assert made.batcher.num_queued_rows == 6
    made.backends[0].gate.release(2)
    assert [request.wait() for request in requests] == [[[2, 2], [4, 4]], [[6, 6]], [[8, 8], [10, 10], [12, 12]]]
    assert made.backends[0].batches == [1, 6]


def test_a_batch_has_at_most_max_batch_size_rows(harness) -> None:
    made = harness(Doubler(held=True), max_batch_size=4)
    made.occupy()
    requests = [made.submit(1, 2, 3), made.submit(4, 5), made.submit(6)]
    made.backends[0].gate.release(3)
    for request in requests:
        request.wait()
    assert made.backends[0].batches == [1, 3, 3]


def test_a_batch_is_filled_to_its_target_and_a_larger_request_runs_alone(harness) -> None:
    made = harness(Doubler(held=True), target_batch_size=2)
    made.occupy()
    requests = [made.submit(1), made.submit(2), made.submit(3), made.submit(4, 5, 6), made.submit(7)]
    made.backends[0].gate.release(5)
    assert [request.wait() for request in requests][3] == [[8, 8], [10, 10], [12, 12]]
    assert [request.wait() for request in requests][4] == [[14, 14]]
    assert made.backends[0].batches == [1, 2, 1, 3, 1]


def test_different_shapes_do_not_share_a_batch(harness) -> None:
    made = harness(Doubler(held=True))
    made.occupy()
    requests = [made.submit(1), made.submit(2, width=3), made.submit(3, width=3)]
    made.backends[0].gate.release(3)
    assert [request.wait() for request in requests] == [[[2, 2]], [[4, 4, 4]], [[6, 6, 6]]]
    assert made.backends[0].batches == [1, 1, 2]


def test_a_model_without_a_batch_dimension_runs_one_request_at_a_time(harness) -> None:
    made = harness(Doubler(held=True), max_batch_size=0)
    made.occupy()
    requests = [made.submit(1), made.submit(2)]
    made.backends[0].gate.release(3)
    assert [request.wait() for request in requests] == [[[2, 2]], [[4, 4]]]
    assert made.backends[0].batches == [1, 1, 1]


@pytest.mark.parametrize(
    ("ns_per_row", "retry_after_ms"), [(0.0, 100), (1.0, 1), (1.9999e8, 150), (1e12, 1000)], ids=str
)
def test_a_full_queue_refuses_at_once_and_says_when_half_of_it_is_done(
    harness, ns_per_row: float, retry_after_ms: int
) -> None:
    made = harness(Doubler(held=True), Doubler(held=True), max_batch_size=1, max_queue_size=2)
    for _ in made.backends:
        made.submit(1)
    for backend in made.backends:
        assert backend.began.acquire(timeout=TIMEOUT_S)
    made.submit(1)
    made.submit(2, 3)
    made.batcher._ns_per_row = ns_per_row  # 0 before the first batch
    with pytest.raises(ResourceExhausted, match="2 requests wait") as refusal:
        made.submit(4)
    assert refusal.value.retry_after_ms == retry_after_ms
    assert made.statistics.snapshot().failures["REJECTED"] == 1


def test_the_bytes_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_queue, "MAX_QUEUED_BYTES", 10)
    queue = RequestQueue(BatchLimits(max_batch_size=8))
    assert queue.add(Request((1, 2, 3, 4, 5)))
    assert queue.add(Request((6,) * 99)), "one may exceed them"
    assert not queue.add(late := Request())
    queue.take_batch()
    assert not queue.add(late)
    queue.take_batch()
    assert queue.add(late)


def test_a_request_past_its_deadline_is_not_computed(harness) -> None:
    made = harness(Doubler(held=True))
    made.occupy()
    late = made.submit(1, deadline=time.monotonic())
    good = made.submit(2, deadline=time.monotonic() + TIMEOUT_S)
    made.backends[0].gate.release(2)
    assert isinstance(late.wait(), DeadlineExceeded)
    assert good.wait() == [[4, 4]]
    assert made.backends[0].batches == [1, 1]


def test_a_request_past_the_queue_timeout_is_not_computed(harness) -> None:
    made = harness(Doubler(held=True), timeout_us=1)
    made.backends[0].gate.release(1)
    # The first request may start within a microsecond; one that waits for a busy instance cannot.
    made.submit(1).wait()
    held = made.submit(1)
    while not isinstance(held.result, ServingError) and not made.backends[0].began.acquire(timeout=0.01):
        pass
    waiting = made.submit(2)
    made.backends[0].gate.release(9)
    assert isinstance(waiting.wait(), DeadlineExceeded)


class Decoded(Request):
    """A request whose image files took some seconds to decode; its response cannot be built, if that is odd."""

    __slots__ = ()

    def __init__(self, row: int, *, seconds: int) -> None:
        super().__init__((row,))
        self.decoding_ns = seconds * 10**9
        self.arrived_ns -= self.decoding_ns

    def finish(self, outputs: Outputs, first_row: int) -> None:
        if self.decoding_ns % (2 * 10**9):
            raise ValueError
        super().finish(outputs, first_row)


def test_the_queue_timeout_is_for_the_queue_not_for_decoding() -> None:
    queue = RequestQueue(BatchLimits(max_batch_size=8, timeout_us=10**6))
    queue.add(request := Decoded(1, seconds=10))
    assert queue.take_batch() == ([request], [])


def test_decoding_is_no_time_in_the_queue(harness, caplog: pytest.LogCaptureFixture) -> None:
    made = harness(Doubler(held=True))
    first = made.occupy()
    requests = [Decoded(1, seconds=1001), Decoded(2, seconds=100)]
    for request in requests:
        made.batcher.submit(request)
    made.backends[0].gate.release(2)
    for request in [first, *requests]:
        request.wait()
    made.batcher.close()
    now = made.statistics.snapshot()
    assert (now.success.count, now.fail.count) == (2, 1)
    assert now.success.ns > 100e9
    assert 0 <= now.queue.ns < 50e9


def test_cancelling_does_not_affect_other_requests(harness) -> None:
    made = harness(Doubler(held=True))
    made.occupy()
    requests = [made.submit(row) for row in (1, 2, 3)]
    made.batcher.cancel(requests[1])
    made.batcher.cancel(requests[1])
    assert made.batcher.num_queued == 2
    made.backends[0].gate.release(2)
    assert [requests[0].wait(), requests[2].wait()] == [[[2, 2]], [[6, 6]]]
    assert requests[1].result is None
    assert made.backends[0].batches == [1, 2]
    now = made.statistics.snapshot()
    assert now.failures["CANCELED"] == 1
    assert 0 < now.fail.ns < TIMEOUT_S * 1e9


def test_cancelling_a_running_request_has_no_effect(harness) -> None:
    made = harness(Doubler(held=True))
    running = made.occupy()
    made.batcher.cancel(running)
    made.backends[0].gate.release(1)
    assert running.wait() == [[2, 2]]
    made.backends[0].gate.release(1)
    assert made.submit(2).wait() == [[4, 4]]


def test_a_backend_error_fails_only_its_batch(harness, caplog: pytest.LogCaptureFixture) -> None:
    made = harness(Doubler(fails="Traceback of TorchScript:\n  many lines\nRuntimeError: no luck\n"))
    failure = made.submit(1).wait()
    assert isinstance(failure, Internal)
    assert str(failure) == "model 'm' failed: RuntimeError: no luck"
    made.backends[0].fails = ""
    assert made.submit(2).wait() == [[4, 4]]
    assert made.statistics.snapshot().failures["BACKEND"] == 1
    assert "many lines" in caplog.text


@pytest.mark.parametrize(("error", "message"), [("\n \n", "RuntimeError"), ("x" * 10_000, "x" * 400)])
def test_a_backend_error_is_one_short_line(harness, error: str, message: str) -> None:
    assert str(harness(Doubler(fails=error)).submit(1).wait()) == f"model 'm' failed: {message}"


def poisoned(batch: Array) -> list[Array]:
    """Fails on a batch that contains a row of 99."""
    if (batch == 99).any():
        raise IndexError("99 is out of range")
    return [batch * 2]


@pytest.mark.parametrize(
    ("rows", "most_runs"),
    [
        ([99, 1], 3),
        ([1, 2, 99], 4),
        ([1] * 32 + [99] + [2] * 31, 17),
        ([99, *[1] * 7] * 8, 73),  # one in each group
        ([99] * 8 + [1] * 56, 17),  # one group of nothing else
        ([1, 99] * 32, 73),
    ],
)
def test_requests_that_cannot_be_computed_fail_alone(harness, rows: list[int], most_runs: int) -> None:
    made = harness(Doubler(held=True, function=poisoned), max_batch_size=64)
    made.occupy()
    requests = [made.submit(row) for row in rows]
    made.backends[0].gate.release(1000)
    for row, request in zip(rows, requests, strict=True):
        result = request.wait()
        if row == 99:
            assert str(result) == "model 'm' failed: 99 is out of range"
        else:
            assert result == [[2 * row] * 2]
    assert made.backends[0].batches[1] == len(rows)
    assert len(made.backends[0].batches) - 1 <= most_runs
    made.batcher.close()
    assert made.batcher.num_running == 0
    assert made.statistics.snapshot().failures["BACKEND"] == rows.count(99)
    assert made.statistics.snapshot().success.count == len(rows) - rows.count(99) + 1


def test_requests_of_several_rows_are_isolated_whole(harness) -> None:
    made = harness(Doubler(held=True, function=poisoned), max_batch_size=64)
    made.occupy()
    requests = [made.submit(1, 2), made.submit(3, 99), made.submit(4, 5, 6)]
    made.backends[0].gate.release(1000)
    assert requests[0].wait() == [[2, 2], [4, 4]]
    assert isinstance(requests[1].wait(), Internal)
    assert requests[2].wait() == [[8, 8], [10, 10], [12, 12]]


def test_a_model_that_fails_on_everything_fails_fast(harness) -> None:
    """Retries that rescue nothing take a second in advance: here the first batch. The second one runs once."""

    def broken(batch: Array) -> list[Array]:
        if len(batch) == 4:
            time.sleep(0.6)
        raise RuntimeError("broken")

    made = harness(Doubler(held=True, function=broken), max_batch_size=16)
    made.occupy()
    requests = [made.submit(1) for _ in range(32)]
    made.backends[0].gate.release(1000)
    assert {str(request.wait()) for request in requests} == {"model 'm' failed: broken"}
    assert made.backends[0].batches == [1, 16, *[4, 1, 1, 1, 1] * 4, 16]


ODD_ANSWERS = {
    "nothing": (lambda x: None, "expected a list of 1 arrays, got NoneType"),
    "no outputs": (lambda x: [], "expected a list of 1 arrays, got list of 0"),
    "two outputs": (lambda x: [x, x], "expected a list of 1 arrays, got list of 2"),
    "a generator": (lambda x: (x for _ in range(1)), "expected a list of 1 arrays, got generator"),
    "a list of lists": (lambda x: [x.tolist()], "output 'y' is list of 1, but the configuration says UINT8"),
    "an object without shape": (lambda x: [object()], "output 'y' is object, but the configuration says UINT8"),
    "no batch dimension": (lambda x: [x[0]], "output 'y' is uint8 of shape [2], but the configuration says UINT8 of"),
    "a scalar": (lambda x: [x.sum()], "output 'y' is uint64, but"),
    "a third dimension": (lambda x: [x[..., None]], "output 'y' is uint8 of shape [1, 2, 1]"),
    "too many rows": (lambda x: [np.concatenate([x, x])], "is uint8 of shape [2, 2], but the configuration says UINT8"),
    "doubles": (lambda x: [x.astype(np.float64)], "is float64 of shape [1, 2], but the configuration says UINT8 of"),
    "swapped bytes": (lambda x: [x.astype(">u2")], "is >u2"),
}


@pytest.mark.parametrize(("function", "message"), ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_an_odd_answer_fails_its_request_and_no_other(harness, function, message: str) -> None:
    backend = Doubler(function=function)
    made = harness(backend)
    failure = made.submit(1).wait()
    assert isinstance(failure, Internal)
    assert message in str(failure)
    backend.function = poisoned
    assert made.submit(2).wait() == [[4, 4]]
    assert made.batcher.num_queued == 0


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), MemoryError(), Unprintable()])
def test_no_exception_of_a_backend_ends_its_thread(harness, error: BaseException) -> None:
    def fails(batch: Array) -> list[Array]:
        raise error

    backend = Doubler(function=fails)
    made = harness(backend)
    failure = made.submit(1).wait()
    assert isinstance(failure, Internal)
    assert str(failure).startswith("model 'm' failed: ")
    backend.function = poisoned
    assert made.submit(2).wait() == [[4, 4]]


class OddRequest(Request):
    """A request whose own code raises."""

    __slots__ = ()

    def finish(self, outputs: Outputs, first_row: int) -> None:
        raise SystemExit

    def fail(self, error: ServingError) -> None:
        super().fail(error)
        raise SystemExit


def test_an_odd_request_does_not_end_the_thread(harness) -> None:
    made = harness(Doubler())
    odd = OddRequest()
    made.batcher.submit(odd)
    assert isinstance(odd.wait(), Internal)
    assert made.submit(2).wait() == [[4, 4]]


def test_a_flood_of_failures_logs_one_traceback(harness, caplog: pytest.LogCaptureFixture) -> None:
    made = harness(Doubler(function=lambda x: [x[:0]]))
    for _ in range(50):
        made.submit(1).wait()
    assert caplog.text.count("Traceback") == 1


def test_the_queue_delay_fills_batches_and_ends(harness) -> None:
    made = harness(Doubler(), max_batch_size=2, max_queue_delay_us=10_000_000)
    first = made.submit(1)
    time.sleep(0.05)  # the instance waits for more
    made.submit(2).wait()
    assert first.wait() == [[2, 2]]
    assert made.backends[0].batches == [2]
    assert made.statistics.snapshot().batch_triggers["full"] == 1
    short = harness(Doubler(), max_queue_delay_us=1000)
    short.submit(1).wait()
    assert short.statistics.snapshot().batch_triggers["delay"] == 1


def test_two_instances_run_at_the_same_time(harness) -> None:
    made = harness(Doubler(held=True), Doubler(held=True), max_batch_size=1)
    requests = [made.submit(1), made.submit(2)]
    for backend in made.backends:
        assert backend.began.acquire(timeout=TIMEOUT_S)
    for backend in made.backends:
        backend.gate.release()
    assert [request.wait() for request in requests] == [[[2, 2]], [[4, 4]]]


def test_closing_finishes_queued_requests_and_refuses_new_ones(harness) -> None:
    made = harness(Doubler(held=True))
    requests = [made.occupy(), made.submit(2)]
    closing = threading.Thread(target=made.batcher.close)
    closing.start()
    made.backends[0].gate.release(2)
    closing.join(TIMEOUT_S)
    assert [request.wait() for request in requests] == [[[2, 2]], [[4, 4]]]
    assert made.backends[0].is_closed
    with pytest.raises(BatcherClosed):
        made.submit(3)


def test_without_threads_it_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    start, num_left = threading.Thread.start, iter(range(2))  # the watchdog's, and that of one instance

    def refuse(thread: threading.Thread) -> None:
        if next(num_left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    backends, limits = [Doubler() for _ in range(3)], BatchLimits(max_batch_size=1, batch_timeout_s=60)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Batcher("m", backends, limits, Statistics())
    assert [backend.is_closed for backend in backends] == [True] * 3


def test_statistics_count_requests_rows_and_batches(harness) -> None:
    made = harness(Doubler(held=True))
    first = made.occupy()
    requests = [made.submit(1, 2), made.submit(3)]
    made.backends[0].gate.release(2)
    for request in [first, *requests]:
        request.wait()
    made.batcher.close()
    now = made.statistics.snapshot()
    assert now.inference_count == 4
    assert now.execution_count == 2
    assert {now.success.count, now.queue.count, now.compute_infer.count} == {3}
    assert {size: spent.count for size, spent in now.batch_sizes.items()} == {1: 1, 3: 1}
    assert sum(now.latency_counts) == 3
    assert now.success.ns >= now.queue.ns + now.compute_infer.ns


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=4), min_size=1, max_size=20), st.integers(4, 9))
def test_batching_never_mixes_rows(sent: list[list[int]], max_batch_size: int) -> None:
    made = Harness(Doubler(held=True), max_batch_size=max_batch_size)
    made.occupy()
    requests = [made.submit(*rows) for rows in sent]
    made.backends[0].gate.release(1000)
    results = [request.wait() for request in requests]
    made.close()
    assert results == [[[2 * row] * 2 for row in rows] for rows in sent]
    assert max(made.backends[0].batches) <= max_batch_size
