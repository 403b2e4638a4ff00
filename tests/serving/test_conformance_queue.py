"""What the configuration of a model says of its queue and its responses, with Triton's clients on every front end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from serving.config import ServeConfig
from tests.serving.conftest import Served, serve

COUNTING_MODEL = """
runs = 0


def run(batch):
    global runs
    runs += 1
    return {"y": batch["x"] + 1000 * runs, "z": batch["x"]}
"""
TENSORS = """
backend: "python" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP32 dims: 2 } output { name: "z" data_type: TYPE_FP32 dims: 2 }
"""


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
    config = ServeConfig(
        model_repository=str(repository),
        model_control_mode="explicit",
        load_model=("cached",),
        allow_model_code=True,
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
