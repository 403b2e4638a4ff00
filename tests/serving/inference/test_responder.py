"""Where an instance computes on a GPU, another thread answers: the GPU does not wait for encoding."""

import threading
from collections.abc import Iterator

import pytest

from serving.errors import Internal, ServingError
from serving.inference.outputs import Outputs
from tests.serving.inference.test_batcher import TIMEOUT_S, Doubler, Harness, Request


class GpuDoubler(Doubler):
    """A backend that claims to compute on a GPU."""

    uses_gpu = True


class SlowRequest(Request):
    """A request whose response is encoded when the test allows it."""

    __slots__ = ("encoding", "thread")

    def __init__(self, encoding: threading.Event) -> None:
        super().__init__()
        self.encoding = encoding
        self.thread = ""

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self.thread = threading.current_thread().name
        assert self.encoding.wait(TIMEOUT_S)
        super().finish(outputs, first_row)

    def fail(self, error: ServingError) -> None:
        self.thread = threading.current_thread().name
        super().fail(error)


@pytest.fixture
def encoding() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def submit(made: Harness, encoding: threading.Event, number: int) -> list[SlowRequest]:
    requests = [SlowRequest(encoding) for _ in range(number)]
    for request in requests:
        made.batcher.submit(request)
    return requests


def test_a_gpu_computes_on_while_responses_are_encoded(encoding: threading.Event) -> None:
    made = Harness(GpuDoubler(), max_batch_size=1)
    requests = submit(made, encoding, 2)
    for _ in requests:
        assert made.backends[0].began.acquire(timeout=TIMEOUT_S)
    assert not any(request.is_done.is_set() for request in requests)
    encoding.set()
    assert [request.wait() for request in requests] == [[[2, 2]]] * 2
    assert {request.thread for request in requests} == {"m-responder"}
    made.close()
    assert made.batcher.num_running == 0
    assert made.statistics.snapshot().success.count == 2


def test_the_batches_that_wait_for_the_response_thread_are_bounded(encoding: threading.Event) -> None:
    made = Harness(GpuDoubler(), max_batch_size=1)
    requests = submit(made, encoding, 20)
    for _ in range(4):  # one is being encoded, two wait, and the instance holds one
        assert made.backends[0].began.acquire(timeout=TIMEOUT_S)
    assert not made.backends[0].began.acquire(timeout=0.2)
    encoding.set()
    made.close()
    assert [request.result for request in requests] == [[[2, 2]]] * 20, "closing answers all"


def test_errors_need_no_response_thread(encoding: threading.Event) -> None:
    made = Harness(GpuDoubler(fails="no luck"))
    (request,) = submit(made, encoding, 1)
    assert isinstance(request.wait(), Internal)
    assert request.thread == "m-0"
    made.close()


def test_an_instance_on_a_cpu_answers_by_itself(encoding: threading.Event) -> None:
    encoding.set()
    made = Harness(Doubler())
    (request,) = submit(made, encoding, 1)
    request.wait()
    assert request.thread == "m-0"
    made.close()
