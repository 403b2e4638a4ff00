"""What the configuration of a model says of its queue and its responses, with Triton's clients on every front end."""

import queue
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from protos import grpc_service_pb2 as pb
from serving.config import ServeConfig
from tests.serving.conftest import SERVICE, Served, serve
from tests.serving.test_conformance_batching import wait_until

COUNTING_MODEL = """
import pathlib
import time

runs = 0


def run(batch):
    global runs
    runs += 1
    while batch["x"].min() < 0 and pathlib.Path(__file__).with_name("held").exists():
        time.sleep(0.001)
    return {"y": batch["x"] + 1000 * runs, "z": batch["x"]}
"""
TENSORS = """
backend: "python" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP32 dims: 2 } output { name: "z" data_type: TYPE_FP32 dims: 2 }
"""


PRIORITIES = """
instance_group { count: 1 kind: KIND_CPU }
dynamic_batching {
  preferred_batch_size: 1
  priority_levels: 2 default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1000000000 }
  priority_queue_policy { key: 1 value { max_queue_size: 2 allow_timeout_override: true } }
}
"""

SHARED = 'instance_group { count: 1 kind: KIND_CPU rate_limiter { resources { name: "bandwidth" count: 1 } } }'


def write_model(repository: Path, name: str, config: str) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(COUNTING_MODEL)
    (folder.parent / "config.pbtxt").write_text(TENSORS + config)


@pytest.fixture(scope="module", params=["native", "grpcio"])
def extended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server for each gRPC transport."""
    repository = tmp_path_factory.mktemp("models")
    write_model(repository, "cached", "response_cache { enable: true }")
    write_model(repository, "urgent", PRIORITIES)
    write_model(repository, "first", SHARED)
    write_model(repository, "second", SHARED)
    config = ServeConfig(
        model_repository=str(repository),
        model_control_mode="explicit",
        load_model=("cached", "urgent", "first", "second"),
        allow_model_code=True,
        rate_limit="execution_count",
        transport=request.param,
        grpc_port=0,
        http_port=0,
        metrics_port=0,
        device="cpu",
        num_threads=1,
    )
    yield from serve(config)


Clients = tuple[tuple[Any, Any], tuple[Any, Any]]
"""The client and its module, of gRPC and of HTTP."""


@pytest.fixture(scope="module")
def clients(extended: Served) -> Iterator[Clients]:
    with (
        triton_grpc.InferenceServerClient(extended.target) as grpc_client,
        triton_http.InferenceServerClient(f"127.0.0.1:{extended.server.http.port}") as http_client,
    ):
        yield (grpc_client, triton_grpc), (http_client, triton_http)


def connect(served: Served, front_end: int) -> Any:
    """Returns a new client, for several requests at once."""
    if front_end == 0:
        return triton_grpc.InferenceServerClient(served.target)
    return triton_http.InferenceServerClient(f"127.0.0.1:{served.server.http.port}", concurrency=8)


def ask(
    client: Any, module: Any, model: str, x: list[list[float]], outputs: tuple[str, ...] = (), **options: Any
) -> Any:
    array = np.array(x, np.float32)
    given = module.InferInput("x", list(array.shape), "FP32")
    given.set_data_from_numpy(array)
    wanted = [module.InferRequestedOutput(name) for name in outputs] or None
    return client.infer(model, [given], outputs=wanted, **options)


def cache_counts(client: triton_grpc.InferenceServerClient, model: str) -> tuple[int, int, int]:
    """Hits, misses and successes."""
    stats = client.get_inference_statistics(model).model_stats[0].inference_stats
    return stats.cache_hit.count, stats.cache_miss.count, stats.success.count


def test_one_entry_answers_all_front_ends_and_every_choice_of_outputs(clients: Clients) -> None:
    (grpc_client, grpc_module), (http_client, http_module) = clients
    first = ask(grpc_client, grpc_module, "cached", [[1, 2], [3, 4]]).as_numpy("y")
    for client, module in clients:
        again = ask(client, module, "cached", [[1, 2], [3, 4]])
        np.testing.assert_array_equal(again.as_numpy("y"), first)
        only = ask(client, module, "cached", [[1, 2], [3, 4]], ("z",))
        assert only.as_numpy("y") is None
        np.testing.assert_array_equal(only.as_numpy("z"), [[1, 2], [3, 4]])
    assert (ask(http_client, http_module, "cached", [[1, 2]]).as_numpy("y") != first[:1]).all()  # other rows are a miss
    hits, misses, successes = cache_counts(grpc_client, "cached")
    assert (hits, misses, successes) == (4, 2, 6)
    in_json = http_client.get_inference_statistics("cached")["model_stats"][0]["inference_stats"]
    assert (in_json["cache_hit"]["count"], in_json["cache_miss"]["count"]) == (4, 2)


def test_an_entry_does_not_outlive_its_version(extended: Served, clients: Clients) -> None:
    (client, module), _ = clients
    before = [ask(client, module, "cached", [[7, 7]]).as_numpy("y")[0, 0] for _ in range(2)]
    assert before[0] == before[1]
    client.unload_model("cached")
    client.load_model("cached")
    assert cache_counts(client, "cached") == (0, 0, 0)
    assert [ask(client, module, "cached", [[7, 7]]).as_numpy("z")[0, 0] for _ in range(2)] == [7, 7]
    assert cache_counts(client, "cached") == (1, 1, 2)


# ---- Priorities ------------------------------------------------------------------------------------------------------


class Held:
    """A model whose only instance waits until the test lets it go."""

    def __init__(self, served: Served, client: Any, module: Any) -> None:
        self._file = served.server.repository._path / "urgent" / "1" / "held"
        self._batcher = served.server.repository.get("urgent").batcher
        self._client, self._module = client, module
        self._pool = ThreadPoolExecutor(8)
        self._answered: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()

    def __enter__(self) -> "Held":
        self._file.touch()
        self._pool.submit(ask, self._client, self._module, "urgent", [[-1, -1]])
        wait_until(lambda: self._batcher.num_running == 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)
        self._pool.shutdown()

    def send(self, name: str, **options: Any) -> None:
        """Sends a request, and returns once it waits or is refused."""
        waiting = self._batcher.num_queued

        def run() -> None:
            try:
                answer = ask(self._client, self._module, "urgent", [[1, 1]], **options)
                self._answered.put((float(answer.as_numpy("y")[0, 0]), name))
            except InferenceServerException as error:
                self._answered.put((0.0, f"{name}: {error.message()}"))

        self._pool.submit(run)
        wait_until(lambda: self._batcher.num_queued > waiting or not self._answered.empty())

    def release(self, count: int) -> list[str]:
        """Returns what was refused and what was answered, in the order in which the model ran it."""
        self._file.unlink()
        return [name for _, name in sorted(self._answered.get(timeout=60) for _ in range(count))]


@pytest.mark.parametrize("front_end", [0, 1], ids=["grpc", "http"])
def test_urgent_requests_go_first_and_have_a_queue_of_their_own(
    extended: Served, clients: Clients, front_end: int
) -> None:
    _, module = clients[front_end]
    with connect(extended, front_end) as client, Held(extended, client, module) as held:
        held.send("default")
        held.send("low", priority=2)
        held.send("no such priority", priority=9)
        held.send("urgent", priority=1)
        held.send("expired", priority=1, timeout=1)
        held.send("too many", priority=1)
        expired, too_many, *answered = held.release(6)
    assert re.match("expired: .*too late for model 'urgent'", expired)
    assert re.match("too many: .*the queue of model 'urgent' is full", too_many)
    assert answered == ["urgent", "default", "low", "no such priority"]


@pytest.mark.parametrize("front_end", [0, 1], ids=["grpc", "http"])
def test_a_time_out_is_the_policy_s_where_it_delays(extended: Served, clients: Clients, front_end: int) -> None:
    _, module = clients[front_end]
    with connect(extended, front_end) as client, Held(extended, client, module) as held:
        held.send("has no say", priority=2, timeout=1)
        assert held.release(1) == ["has no say"]


def test_a_priority_must_be_a_number(extended: Served) -> None:
    request = pb.ModelInferRequest(model_name="urgent")
    request.parameters["priority"].string_param = "high"
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(bytes(8))
    call = extended.channel.unary_unary(
        SERVICE + "ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )
    with pytest.raises(grpc.RpcError, match="parameter 'priority' must be a whole number, got 'high'"):
        call(request)


# ---- Rate limits -----------------------------------------------------------------------------------------------------


def test_models_that_share_a_resource_wait_for_each_other(extended: Served, clients: Clients) -> None:
    """The first computes for a caller over gRPC, the second would for one over HTTP."""
    (grpc_client, grpc_module), (_, http_module) = clients
    first, second = (extended.server.repository.get(name).batcher for name in ("first", "second"))
    held = extended.server.repository._path / "first" / "1" / "held"
    held.touch()
    with connect(extended, 1) as http_client, ThreadPoolExecutor(2) as pool:
        try:
            computing = pool.submit(ask, grpc_client, grpc_module, "first", [[-1, -1]])
            wait_until(lambda: first.num_running == 1)
            waiting = pool.submit(ask, http_client, http_module, "second", [[2, 2]])
            wait_until(lambda: second.num_running + second.num_queued == 1)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            assert not computing.done()
        finally:
            held.unlink()
        assert computing.result(60).as_numpy("z").tolist() == [[-1, -1]]
        assert waiting.result(60).as_numpy("z").tolist() == [[2, 2]]
    text = httpx.get(f"http://127.0.0.1:{extended.server.http.metrics_port}/metrics").text
    [limited] = re.findall(r'^convoy_rate_limited_seconds_total{model="second",version="1"} (.+)$', text, re.MULTILINE)
    assert float(limited) >= 0.2
