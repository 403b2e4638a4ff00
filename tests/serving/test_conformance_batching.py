"""Many clients at once, on both gRPC front ends.

Rows never mix; cancelled, late and refused requests do not affect others.
"""

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import grpc_service_pb2 as pb
from serving.client import Client, ClientError
from serving.inference.bound_request import BoundRequest
from serving.models.repository import Model
from serving.observability.statistics import Snapshot
from tests.serving.conftest import SERVICE, Served, tensor
from tests.serving.onnx_models import WEIGHTS

TIMEOUT_S = 60


def ask(served: Served, model: str, name: str, array: npt.NDArray[Any], timeout_s: float = TIMEOUT_S) -> grpc.Future:
    """Starts an inference."""
    request = pb.ModelInferRequest(model_name=model)
    datatype = {"float32": "FP32", "int64": "INT64"}[array.dtype.name]
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    call = served.channel.unary_unary(
        SERVICE + "ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )
    return call.future(request, timeout=timeout_s)


def wait_until(happened: Callable[[], object]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < until, "the condition did not become true"
        time.sleep(0.001)


def counts_at_rest(model: Model) -> Snapshot:
    """Returns the statistics once all batches are counted, which happens just after their responses are sent."""
    wait_until(lambda: model.batcher.num_running == 0)
    return model.statistics.snapshot()


# ---- Rows ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=24), seed=st.integers(0, 2**32 - 1))
def test_batches_never_mix_rows(served: Served, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    sent = [rng.normal(size=(rows, 4)).astype(np.float32) for rows in sizes]

    calls = [ask(served, "rows", "x", x) for x in sent]

    for x, call in zip(sent, calls, strict=True):
        echo, product = (np.frombuffer(raw, np.float32) for raw in call.result().raw_output_contents)
        np.testing.assert_array_equal(echo.reshape(x.shape), x)
        np.testing.assert_allclose(product.reshape(-1, 3), x @ WEIGHTS, atol=1e-5, rtol=0)


def test_requests_that_wait_together_run_together(served: Served) -> None:
    model = served.server.repository.get("slow")
    before = counts_at_rest(model)
    first = occupy(served, model)
    others = [ask(served, "slow", "loops", np.array([[number]])) for number in (1, 2)]
    wait_until(lambda: model.batcher.num_queued == 2)
    assert [response(call) for call in (first, *others)] == [[BUSY], [1], [2]]
    wait_until(lambda: model.statistics.snapshot().inference_count == before.inference_count + 3)
    assert model.statistics.snapshot().execution_count == before.execution_count + 2


def test_many_threads_many_shapes(served: Served) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        with Client(served.target) as client:
            for _ in range(25):
                x = rng.normal(size=(int(rng.integers(1, 20)), 4)).astype(np.float32)
                if not np.array_equal(client.infer("rows", {"x": x}, outputs=["echo"])["echo"], x):
                    wrong.append(x)
                words = [[f"{number} {rng.integers(100)}"] * int(rng.integers(1, 4))]
                got = client.infer("strings", {"text": words})["echo"]
                if [[word.decode() for word in row] for row in got] != words:
                    wrong.append(words)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_comes_and_goes_while_another_is_under_load(
    served: Served, client: triton.InferenceServerClient
) -> None:
    responses: list[bool] = []
    over = threading.Event()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)

    def work() -> None:
        with Client(served.target) as caller:
            while not over.is_set():
                responses.append(np.array_equal(caller.infer("rows", {"x": x})["echo"], x))

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(work) for _ in range(4)]
        try:
            for _ in range(5):
                seen = len(responses)
                client.load_model("spare")
                client.infer("spare", [tensor("x", x)])
                client.unload_model("spare")
                wait_until(lambda seen=seen: len(responses) >= seen + 20 or any(caller.done() for caller in callers))
        finally:
            over.set()
    for caller in callers:
        caller.result()
    assert all(responses)


# ---- Cancellation, deadlines, full queues ----------------------------------------------------------------------------

BUSY = 20_000
"""Loops that take the model `slow` between a third of a second and a second."""


def occupy(served: Served, model: Model) -> grpc.Future:
    """Starts an inference that occupies the model."""
    wait_until(lambda: model.batcher.num_running == 0)
    call = ask(served, "slow", "loops", np.array([[BUSY]]))
    wait_until(lambda: model.batcher.num_running == 1)
    return call


def response(call: grpc.Future) -> list[int]:
    return [int(number) for number in np.frombuffer(call.result().raw_output_contents[0], np.int64)]


@pytest.fixture
def slow(served: Served) -> Model:
    return served.server.repository.get("slow")


def test_a_request_cancelled_in_the_queue_is_not_computed(served: Served, slow: Model) -> None:
    before = counts_at_rest(slow)
    first = occupy(served, slow)
    leaving, staying = (ask(served, "slow", "loops", np.array([[number]])) for number in (1, 2))
    wait_until(lambda: slow.batcher.num_queued == 2)
    leaving.cancel()
    wait_until(lambda: slow.batcher.num_queued == 1)
    assert (response(first), response(staying)) == ([BUSY], [2])
    wait_until(lambda: slow.statistics.snapshot().execution_count == before.execution_count + 2)
    after = slow.statistics.snapshot()
    assert after.inference_count == before.inference_count + 2
    assert after.failures["CANCELED"] == before.failures.get("CANCELED", 0) + 1


def test_a_request_cancelled_in_a_batch_does_not_affect_the_others(served: Served, slow: Model) -> None:
    first = occupy(served, slow)
    leaving, staying = (ask(served, "slow", "loops", np.array([[BUSY + number]])) for number in (1, 2))
    wait_until(lambda: slow.batcher.num_queued == 2)
    assert response(first) == [BUSY]
    wait_until(lambda: slow.batcher.num_running == 2)
    leaving.cancel()
    assert response(staying) == [BUSY + 2]
    assert response(ask(served, "slow", "loops", np.array([[3]]))) == [3]


def test_a_request_past_its_deadline_is_not_computed(served: Served, slow: Model) -> None:
    before = counts_at_rest(slow)
    first = occupy(served, slow)
    late = ask(served, "slow", "loops", np.array([[1]]), timeout_s=0.05)
    assert late.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert not first.done(), "the deadline is reported before the model is free"
    assert response(first) == [BUSY]
    assert response(ask(served, "slow", "loops", np.array([[2]]))) == [2]
    wait_until(lambda: slow.statistics.snapshot().execution_count == before.execution_count + 2)
    assert slow.statistics.snapshot().inference_count == before.inference_count + 2


def test_the_parameter_timeout(served: Served, slow: Model) -> None:
    """Triton's request parameter, in microseconds."""
    first = occupy(served, slow)
    request = pb.ModelInferRequest(model_name="slow")
    request.parameters["timeout"].int64_param = 1000
    request.inputs.add(name="loops", datatype="INT64", shape=[1, 1]).contents.int64_contents.append(1)
    call = served.channel.unary_unary(SERVICE + "ModelInfer").future(request.SerializeToString(), timeout=TIMEOUT_S)
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "too late for model 'slow': the request waited" in call.details()
    assert response(first) == [BUSY]


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(served: Served, slow: Model) -> None:
    before = counts_at_rest(slow)
    first = occupy(served, slow)
    waiting = [ask(served, "slow", "loops", np.array([[number]])) for number in (1, 2)]
    wait_until(lambda: slow.batcher.num_queued == 2)
    refused = ask(served, "slow", "loops", np.array([[3]]))
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not first.done()
    assert refused.details() == "the queue of model 'slow' is full: 2 requests wait"
    # pygrpc-native refuses to send names that begin with grpc-.
    name = "retry-pushback-ms" if served.transport == "native" else "grpc-retry-pushback-ms"
    assert 1 <= int(dict(refused.trailing_metadata())[name]) <= 1000
    assert [response(call) for call in (first, *waiting)] == [[BUSY], [1], [2]]
    assert slow.statistics.snapshot().failures["REJECTED"] == before.failures.get("REJECTED", 0) + 1


def test_our_client_retries_when_the_queue_is_full(served: Served, slow: Model) -> None:
    before = counts_at_rest(slow)
    with Client(served.target, timeout_s=TIMEOUT_S) as client:
        assert client.is_live()  # connects before the queue is full
        calls = [occupy(served, slow)]
        calls += [ask(served, "slow", "loops", np.array([[number]])) for number in (1, 2)]
        wait_until(lambda: slow.batcher.num_queued == 2)
        assert client.infer("slow", {"loops": np.array([[3]])})["echo"].tolist() == [[3]]
    assert [response(call) for call in calls] == [[BUSY], [1], [2]]
    assert slow.statistics.snapshot().failures["REJECTED"] > before.failures.get("REJECTED", 0)


def test_our_client_gives_up_at_its_deadline(served: Served, slow: Model) -> None:
    first = occupy(served, slow)
    with Client(served.target, timeout_s=0.05) as client, pytest.raises(ClientError) as caught:
        client.infer("slow", {"loops": np.array([[1]])})
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert response(first) == [BUSY]


def test_a_finished_call_holds_no_memory(served: Served, slow: Model) -> None:
    """Requests with and without a cached plan, refused and cancelled ones are freed without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert response(ask(served, "slow", "loops", np.array([[1]]))) == [1]
        assert ask(served, "slow", "loops", np.array([1])).code() == grpc.StatusCode.INVALID_ARGUMENT
        first = occupy(served, slow)
        leaving = ask(served, "slow", "loops", np.array([[1]]))
        wait_until(lambda: slow.batcher.num_queued == 1)
        leaving.cancel()
        wait_until(lambda: slow.batcher.num_queued == 0)
        assert response(first) == [BUSY]
        wait_until(lambda: not any(type(one) is BoundRequest for one in gc.get_objects()))
    finally:
        gc.enable()


def test_failures_of_each_kind_are_counted(served: Served, slow: Model, client: triton.InferenceServerClient) -> None:
    def failures(name: str) -> Any:
        return client.get_inference_statistics(name).model_stats[0].inference_stats.fail

    counts_at_rest(slow)
    before, failed_before = failures("slow"), failures("failing")
    first = occupy(served, slow)
    leaving, staying = (ask(served, "slow", "loops", np.array([[number]])) for number in (1, 2))
    wait_until(lambda: slow.batcher.num_queued == 2)
    rejected = ask(served, "slow", "loops", np.array([[3]]))
    assert rejected.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failures("slow").count == before.count + 1

    leaving.cancel()
    wait_until(lambda: failures("slow").count == before.count + 2)
    assert failures("slow").ns > before.ns, "the cancelled request had waited"

    assert (response(first), response(staying)) == ([BUSY], [2])

    failed = ask(served, "failing", "index", np.array([[9]]))
    assert failed.code() == grpc.StatusCode.INTERNAL
    wait_until(lambda: failures("failing").count == failed_before.count + 1)
    assert failures("failing").ns > failed_before.ns


def test_a_failing_batch_does_not_affect_others(served: Served) -> None:
    codes = [ask(served, "failing", "index", np.array([[index]])).code() for index in (0, 9, 1, 9, 2)]
    ok, internal = grpc.StatusCode.OK, grpc.StatusCode.INTERNAL
    assert codes == [ok, internal, ok, internal, ok]
