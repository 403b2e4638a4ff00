"""Calls are counted by method and status, on every front end; the metrics are Prometheus's or OpenMetrics."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from serving.frontends.grpcio import GrpcioFrontend
from serving.frontends.http import HttpFrontend
from serving.frontends.native import NativeFrontend
from serving.inference.request_queue import BatchLimits
from serving.observability.metrics import NAMES
from tests.serving.fake_repository import FakeRepository, backend_of, make_services, twice
from tests.serving.frontends.callers import wait_until
from tests.serving.frontends.http.conftest import ANY_PORT, MAX_BODY

SERVICE = "/inference.GRPCInferenceService/"
PROMETHEUS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
"""What Prometheus accepts."""
BODY = {"inputs": [{"name": "numbers", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}

Counts = dict[tuple[str, str, str, str], float]


class Front:
    """All front ends over one service."""

    def __init__(self, repository: FakeRepository) -> None:
        services = make_services(repository)
        self.http = HttpFrontend(services, ANY_PORT, max_message_bytes=MAX_BODY)
        self.grpc = [
            kind(services, address="127.0.0.1:0", max_message_bytes=MAX_BODY)  # type: ignore[abstract, call-arg]
            for kind in (NativeFrontend, GrpcioFrontend)
        ]
        for front in (self.http, *self.grpc):
            front.start()

    def post(self, path: str, body: Any, **options: Any) -> int:
        return httpx.post(f"http://127.0.0.1:{self.http.port}{path}", json=body, **options).status_code

    def get(self, path: str) -> int:
        return httpx.get(f"http://127.0.0.1:{self.http.port}{path}").status_code

    def call(self, method: str) -> None:
        """Calls a method with an empty message on each gRPC transport."""
        for front in self.grpc:
            with grpc.insecure_channel(f"127.0.0.1:{front.port}") as channel, contextlib.suppress(grpc.RpcError):
                channel.unary_unary(SERVICE + method)(b"", timeout=30)

    def metrics(self, accept: str = "") -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.http.metrics_port}/metrics", headers={"accept": accept})

    def counts(self) -> Counts:
        """Returns the calls by method, status, model and version; those of the histogram are the same."""
        families = {family.name: family for family in parse_text(self.metrics().text)}
        found = {labels(sample): sample.value for sample in families["convoy_calls"].samples}
        timed = families["convoy_call_duration_seconds"].samples
        assert found == {labels(sample): sample.value for sample in timed if sample.name.endswith("_count")}
        return found


def labels(sample: Any) -> tuple[str, str, str, str]:
    return tuple(sample.labels[name] for name in ("method", "status", "model", "version"))  # type: ignore[return-value]


@pytest.fixture
def repository() -> Iterator[FakeRepository]:
    repository = FakeRepository(twice(limits=BatchLimits(max_batch_size=8, max_queue_size=1)))
    yield repository
    repository.close()


@pytest.fixture
def front(repository: FakeRepository) -> Iterator[Front]:
    front = Front(repository)
    yield front
    for each in (front.http, *front.grpc):
        each.stop(0)


def test_calls_of_all_front_ends(front: Front, repository: FakeRepository) -> None:
    assert front.post("/v2/models/twice/infer", BODY) == 200
    assert front.post("/v2/models/twice/infer", {}) == 400
    assert front.post("/v2/models/none/infer", BODY) == 404
    assert front.post("/v2/models/twice/classify", BODY) == 400
    assert front.get("/v2/models/twice/config") == 200
    assert front.get("/v2/models/none") == 404
    assert front.get("/nothing") == 404
    assert front.get("/v2/repository/models/none") == 404
    assert front.post("/v2/repository/models/twice/promote", {"parameters": {"version": "new"}}) == 400
    front.call("ModelInfer")
    front.call("ServerLive")
    front.call("LogSettings")
    backend_of(repository.get("twice")).function = lambda x: [x / "weights"]
    assert front.post("/v2/models/twice/infer", BODY) == 500
    assert front.counts() == {
        ("ModelInfer", "OK", "twice", "1"): 1,
        ("ModelInfer", "INTERNAL", "twice", "1"): 1,
        ("ModelInfer", "INVALID_ARGUMENT", "twice", ""): 2,
        ("ModelInfer", "NOT_FOUND", "", ""): 3,
        ("ModelConfig", "OK", "", ""): 1,
        ("ModelMetadata", "NOT_FOUND", "", ""): 1,
        ("unknown", "NOT_FOUND", "", ""): 1,
        ("ListModels", "NOT_FOUND", "", ""): 1,
        ("Promote", "INVALID_ARGUMENT", "twice", ""): 1,
        ("ServerLive", "OK", "", ""): 2,
        ("LogSettings", "UNIMPLEMENTED", "", ""): 2,
    }


def test_a_full_queue_counts_with_its_status(front: Front, repository: FakeRepository) -> None:
    model = repository.get("twice")
    backend_of(model).free.clear()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(front.post, "/v2/models/twice/infer", BODY, timeout=60)
        assert backend_of(model).began.acquire(timeout=30)
        waiting = pool.submit(front.post, "/v2/models/twice/infer", BODY, timeout=60)
        wait_until(lambda: model.batcher.num_queued == 1)
        assert front.post("/v2/models/twice/infer", BODY) == 429
        backend_of(model).free.set()
        assert (running.result(), waiting.result()) == (200, 200)
    assert front.counts() == {
        ("ModelInfer", "OK", "twice", "1"): 2,
        ("ModelInfer", "RESOURCE_EXHAUSTED", "twice", "1"): 1,
    }


def test_openmetrics_for_those_that_ask_for_it(front: Front) -> None:
    assert front.post("/v2/models/twice/infer", BODY) == 200
    plain, open_metrics = front.metrics(), front.metrics(PROMETHEUS)
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert open_metrics.text.endswith("# EOF\n")
    assert len(list(parse_openmetrics(open_metrics.text))) > len(NAMES)
    lines, others = (
        {line for line in each.text.splitlines() if "process_" not in line} for each in (plain, open_metrics)
    )
    assert {line for line in lines ^ others if not line.startswith("#")} == set(), "the samples are the same"
    assert "# TYPE nv_inference_count unknown" in others, "OpenMetrics has no counters without _total"
