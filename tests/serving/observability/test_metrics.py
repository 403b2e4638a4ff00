"""The metrics, read back with prometheus_client's parser."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import DeadlineExceeded, ServingError
from serving.inference.decoder import ImageDecoder
from serving.inference.message_memory import MessageMemory
from serving.inference.request import NO_CONTEXT, InferInput, InferRequest, InferResponse
from serving.inference.request_queue import BatchLimits
from serving.inference.service import InferenceService
from serving.observability.metrics import NAMES, Metrics
from serving.observability.model_metrics import MODEL_METRICS
from serving.observability.refusals import Refusals
from tests.serving.fake_repository import PATIENCE_S, Entry, FakeRepository, backend_of, echo, make_service, twice

MINE = {"model": "twice", "version": "1"}


@pytest.fixture
def repository() -> Iterator[FakeRepository]:
    repository = FakeRepository(twice(), echo("FP32"))
    yield repository
    repository.close()


@pytest.fixture
def service(repository: FakeRepository) -> InferenceService:
    return make_service(repository)


@pytest.fixture
def metrics(service: InferenceService) -> Metrics:
    return Metrics(service.repository, service.refusals, service.decoder, service.message_memory)


class Scrape:
    """The samples of one scrape. The parser ends the name of every counter with `_total`."""

    def __init__(self, metrics: Metrics) -> None:
        self.text = metrics.render()[0].decode()
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset((MINE | labels).items())]


def ask(service: InferenceService, rows: int = 1, timeout: int = 0) -> "tuple[threading.Event, list[Any]]":
    """Starts an inference; the event is set once the list holds the response."""
    over, answers = threading.Event(), []
    data = np.ones((rows, 3), np.float32).tobytes()
    request = InferRequest("twice", [InferInput("numbers", "FP32", (rows, 3), data)], parameters={"timeout": timeout})

    class Sink:
        def succeed(self, response: InferResponse, /) -> None:
            answers.append(response)
            over.set()

        def fail(self, error: ServingError) -> None:
            answers.append(error)
            over.set()

    service.submit(request, NO_CONTEXT, Sink())
    return over, answers


def infer(service: InferenceService, rows: int = 1) -> Any:
    over, answers = ask(service, rows)
    assert over.wait(PATIENCE_S)
    return answers[0]


def fail(numbers: Any) -> Any:
    raise RuntimeError("no luck")


def settle(service: InferenceService) -> None:
    """Waits until the batcher is idle: statistics are recorded just after the response."""
    batcher = service.repository.get("twice").batcher
    for _ in range(PATIENCE_S * 200):
        if batcher.num_running == batcher.num_queued == 0:
            return
        threading.Event().wait(0.005)
    pytest.fail("the batcher is still at work")


def test_all_metrics_exist_before_the_first_request(metrics: Metrics) -> None:
    scrape = Scrape(metrics)
    assert {name.removesuffix("_total") for name in NAMES} <= scrape.families.keys()
    assert scrape("convoy_requests_total", outcome="success") == 0
    assert scrape("convoy_request_duration_seconds_bucket", le="+Inf") == 0
    assert scrape("convoy_model_load_seconds") == scrape("nv_model_load_duration_secs") == 0.25


def test_requests_rows_and_batches_are_counted(service: InferenceService, metrics: Metrics) -> None:
    for rows in (1, 3, 3, 8):
        infer(service, rows)
    settle(service)
    scrape = Scrape(metrics)
    assert scrape("convoy_requests_total", outcome="success") == 4
    assert scrape("convoy_inferences_total") == scrape("nv_inference_count_total") == 15
    assert scrape("convoy_batches_total", closed="idle") == scrape("nv_inference_exec_count_total") == 4
    assert scrape("nv_inference_request_success_total") == 4
    buckets = [scrape("convoy_batch_size_rows_bucket", le=f"{bound}.0") for bound in (1, 2, 4, 8)]
    assert buckets == [1, 1, 3, 4]
    assert scrape("convoy_batch_size_rows_sum") == 15
    assert scrape("convoy_batch_size_rows_count") == scrape("convoy_batch_size_rows_bucket", le="+Inf") == 4


def test_durations_are_consistent(service: InferenceService, metrics: Metrics) -> None:
    for _ in range(5):
        infer(service)
    settle(service)
    scrape = Scrape(metrics)
    assert scrape("convoy_request_duration_seconds_count") == 5
    total_us = scrape("nv_inference_request_duration_us_total")
    assert total_us == pytest.approx(1e6 * scrape("convoy_request_duration_seconds_sum"), abs=1)
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert sum(scrape(f"nv_inference_{part}_duration_us_total") for part in parts) == pytest.approx(total_us, abs=5)
    assert total_us > 0


def test_queued_and_failed_requests_are_counted(
    service: InferenceService, metrics: Metrics, repository: FakeRepository
) -> None:
    backend = backend_of(repository.get("twice"))
    backend.free.clear()
    first, _ = ask(service)
    assert backend.began.acquire(timeout=PATIENCE_S)
    late, _ = ask(service, timeout=1)
    waiting, _ = ask(service, rows=5)
    scrape = Scrape(metrics)
    assert scrape("convoy_queue_requests") == scrape("nv_inference_pending_request_count") == 2
    assert scrape("convoy_queue_rows") == 6
    assert scrape("convoy_open_requests") == 3
    assert scrape("convoy_queue_oldest_age_seconds") > 0
    backend.free.set()
    for over in (first, late, waiting):
        assert over.wait(PATIENCE_S)
    settle(service)
    backend.function = fail
    infer(service)
    settle(service)
    scrape = Scrape(metrics)
    assert scrape("convoy_queue_oldest_age_seconds") == scrape("convoy_open_requests") == 0
    outcomes = {why: scrape("convoy_requests_total", outcome=why) for why in ("success", "rejected", "backend")}
    assert outcomes == {"success": 2, "rejected": 1, "backend": 1}
    assert scrape("nv_inference_request_failure_total", reason="REJECTED") == 1
    assert scrape("nv_inference_request_failure_total", reason="BACKEND") == 1
    assert scrape("nv_inference_request_failure_total", reason="CANCELED") == 0


def test_instances_that_hang_are_counted() -> None:
    repository = FakeRepository(twice(limits=BatchLimits(max_batch_size=8, batch_timeout_s=0.1)))
    service = make_service(repository)
    metrics = Metrics(service.repository, service.refusals, service.decoder, service.message_memory)
    assert Scrape(metrics)("convoy_hung_instances") == 0
    backend_of(repository.get("twice")).free.clear()
    over, answers = ask(service)
    assert over.wait(PATIENCE_S)
    assert isinstance(answers[0], DeadlineExceeded)
    assert Scrape(metrics)("convoy_hung_instances") == 1
    repository.close()


def test_every_name_is_exposed_as_in_the_table_and_with_its_type(metrics: Metrics) -> None:
    """prometheus_client alone would write `# TYPE nv_inference_count_total counter` above `nv_inference_count`."""
    lines = Scrape(metrics).text.splitlines()
    for metric in MODEL_METRICS:
        assert f"# TYPE {metric.name} {metric.kind}" in lines
        assert f"# HELP {metric.name} {metric.documentation}" in lines
        sample = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        assert any(line.startswith(f"{sample}{{") for line in lines), metric.name
    assert 'nv_inference_request_failure{model="twice",reason="REJECTED",version="1"} 0.0' in lines
    assert "# TYPE process_cpu_seconds_total counter" in lines
    assert "convoy_server_ready 1.0" in lines
    headers = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert not [name for name in headers if name.endswith("_total_total")]
    assert {name for name in headers if not name.startswith("process_")} == NAMES


def test_the_process_has_metrics(metrics: Metrics) -> None:
    scrape = Scrape(metrics)
    assert scrape.samples["process_resident_memory_bytes", frozenset()] > 1e6
    assert scrape.samples["process_open_fds", frozenset()] > 0


def test_versions_that_are_not_ready(metrics: Metrics, repository: FakeRepository) -> None:
    repository.broken = [Entry('a "strange"\\name\n', "2", "UNAVAILABLE")]
    scrape = Scrape(metrics)
    assert scrape("convoy_model_ready") == 1
    assert scrape("convoy_model_ready", model='a "strange"\\name\n', version="2") == 0
    assert scrape.samples["convoy_server_ready", frozenset()] == 0


def test_scrapes_during_a_swap(service: InferenceService, metrics: Metrics, repository: FakeRepository) -> None:
    over = threading.Event()
    scrapes = []

    def scrape() -> None:
        while not over.is_set():
            scrapes.append(Scrape(metrics)("nv_inference_count_total"))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    for _ in range(30):
        assert isinstance(infer(service), InferResponse)
        repository.replace(twice())
    over.set()
    scraper.join()
    assert scrapes
    assert Scrape(metrics)("nv_inference_count_total") == 0


def test_a_server_without_models() -> None:
    repository = FakeRepository()
    scrape = Scrape(Metrics(make_service(repository).repository, Refusals(), ImageDecoder(), MessageMemory()))
    assert scrape.families["convoy_model_ready"].samples == []
    assert "process_cpu_seconds" in scrape.families
