"""The Prometheus metrics: all names in one table, all values read at the time of the scrape.

Nothing is counted here: a scrape copies the statistics of the batchers and the counts of refused requests. Metrics of
our own are named `convoy_...` and end with their unit. Triton's are exposed under Triton's names (`nv_...`), for
dashboards and tools made for Triton
(https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md). The counters of a model
version that is loaded again start at zero, as after a restart.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from serving.inference.decoder import ImageDecoder
from serving.inference.message_memory import MessageMemory
from serving.models.repository import Model, Repository
from serving.observability.calls import INFER, Calls
from serving.observability.refusals import Refusals
from serving.observability.statistics import LATENCY_BOUNDS_S, Latencies, Snapshot
from serving.protocol.status import NAMES as STATUSES
from serving.protocol.status import OK

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """A model version and its statistics at one moment."""

    model: Model
    stats: Snapshot

    @property
    def batch_counts(self) -> list[int]:
        """Number of batches in each interval between `BATCH_BOUNDS`, the last one open-ended; not cumulative."""
        counts = [0] * (len(BATCH_BOUNDS) + 1)
        for rows, batches in self.stats.batch_sizes.items():
            counts[bisect_left(BATCH_BOUNDS, rows)] += batches.count
        return counts


@dataclass(frozen=True, slots=True)
class Histogram:
    """The value of a histogram.

    Args:
        bounds: the upper bounds of all buckets but the last, which has none.
        counts: observations in each bucket; not cumulative.
        total: sum of the observations.
        exemplars: by the index of their bucket: the id of a trace, the observation, and its time in seconds since 1970.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float
    exemplars: Mapping[int, tuple[str, float, float]] = field(default_factory=dict)


Value = float | Mapping[Any, int] | Histogram


@dataclass(frozen=True, slots=True)
class ModelMetric:
    """A metric that each ready model version has.

    Args:
        read: returns a number, a number for each value of `label`, or a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    documentation: str
    read: Callable[[ModelSnapshot], Value]
    label: str = ""


MODEL_METRICS = (
    ModelMetric(
        "convoy_requests_total",
        "counter",
        "Requests by outcome: success, rejected (the queue was full, or the deadline had passed when the request's "
        "turn came), canceled (the client cancelled the call, or its deadline passed in the queue), backend (the model "
        "failed) or other.",
        lambda m: (
            {"success": m.stats.success.count} | {reason.lower(): count for reason, count in m.stats.failures.items()}
        ),
        label="outcome",
    ),
    ModelMetric("convoy_inferences_total", "counter", "Rows computed.", lambda m: m.stats.inference_count),
    ModelMetric(
        "convoy_batches_total",
        "counter",
        "Batches computed, by what closed them: full, idle (an instance was idle) or delay (the queue delay was over).",
        lambda m: m.stats.batch_triggers,
        label="closed",
    ),
    ModelMetric(
        "convoy_batch_size_rows",
        "histogram",
        "Rows per batch.",
        lambda m: Histogram(BATCH_BOUNDS, m.batch_counts, m.stats.inference_count),
    ),
    ModelMetric(
        "convoy_request_duration_seconds",
        "histogram",
        "Time from the arrival of a request to its response, decoding included; successful requests only.",
        lambda m: Histogram(LATENCY_BOUNDS_S, m.stats.latency_counts, m.stats.success.ns * 1e-9, m.stats.exemplars),
    ),
    ModelMetric("convoy_queue_requests", "gauge", "Requests in the queue.", lambda m: m.model.batcher.num_queued),
    ModelMetric("convoy_queue_rows", "gauge", "Rows in the queue.", lambda m: m.model.batcher.num_queued_rows),
    ModelMetric(
        "convoy_queue_oldest_age_seconds",
        "gauge",
        "Waiting time of the first request in the queue; 0 if the queue is empty.",
        lambda m: m.model.batcher.oldest_age_s(),
    ),
    ModelMetric(
        "convoy_open_requests",
        "gauge",
        "Requests in the queue or being computed.",
        lambda m: m.model.batcher.num_queued + m.model.batcher.num_running,
    ),
    ModelMetric(
        "convoy_hung_instances",
        "gauge",
        "Instances whose batch has exceeded its time limit; a version without any other is not ready.",
        lambda m: m.model.batcher.num_hung,
    ),
    ModelMetric(
        "convoy_broken_instances",
        "gauge",
        "Instances whose batches and own check all fail; a version without any other is not ready.",
        lambda m: m.model.batcher.num_broken,
    ),
    ModelMetric(
        "convoy_model_load_seconds", "gauge", "Time it took to load and warm up the version.", lambda m: m.model.load_s
    ),
    ModelMetric(
        "convoy_rate_limited_seconds_total",
        "counter",
        "Time that instances with a batch waited for resources.",
        lambda m: m.model.batcher.resource_wait_s,
    ),
    ModelMetric(
        "convoy_cache_hits_total",
        "counter",
        "Requests that the response cache answered. They count as successes, but not as rows or batches.",
        lambda m: m.stats.cache_hit.count,
    ),
    ModelMetric(
        "convoy_cache_misses_total",
        "counter",
        "Requests that were looked up in the response cache and not found.",
        lambda m: m.stats.cache_miss.count,
    ),
    ModelMetric(
        "convoy_cache_bytes",
        "gauge",
        "Memory of the version's cached responses.",
        lambda m: 0 if m.model.cache is None else m.model.cache.num_bytes,
    ),
    # Triton's. Durations are sums over all requests, in microseconds.
    ModelMetric("nv_inference_request_success", "counter", "Requests that succeeded.", lambda m: m.stats.success.count),
    ModelMetric(
        "nv_inference_request_failure",
        "counter",
        "Requests that failed, by reason.",
        lambda m: m.stats.failures,
        label="reason",
    ),
    ModelMetric("nv_inference_count", "counter", "Rows computed.", lambda m: m.stats.inference_count),
    ModelMetric("nv_inference_exec_count", "counter", "Batches computed.", lambda m: m.stats.execution_count),
    ModelMetric(
        "nv_inference_pending_request_count", "gauge", "Requests in the queue.", lambda m: m.model.batcher.num_queued
    ),
    ModelMetric(
        "nv_inference_request_duration_us",
        "counter",
        "Time from arrival to response; successful requests only.",
        lambda m: m.stats.success.ns // 1000,
    ),
    ModelMetric("nv_inference_queue_duration_us", "counter", "Time in the queue.", lambda m: m.stats.queue.ns // 1000),
    ModelMetric(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Time to assemble batches.",
        lambda m: m.stats.compute_input.ns // 1000,
    ),
    ModelMetric(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Time to run the model.",
        lambda m: m.stats.compute_infer.ns // 1000,
    ),
    ModelMetric(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Time to split outputs and send responses.",
        lambda m: m.stats.compute_output.ns // 1000,
    ),
    ModelMetric(
        "nv_cache_num_hits_per_model", "counter", "Requests found in the cache.", lambda m: m.stats.cache_hit.count
    ),
    ModelMetric(
        "nv_cache_num_misses_per_model", "counter", "Requests not found there.", lambda m: m.stats.cache_miss.count
    ),
    ModelMetric(
        "nv_cache_hit_duration_per_model",
        "counter",
        "Time of requests found in the cache, in microseconds.",
        lambda m: m.stats.cache_hit.ns // 1000,
    ),
    ModelMetric(
        "nv_cache_miss_duration_per_model",
        "counter",
        "Time to look up the others and to add their responses, in microseconds.",
        lambda m: m.stats.cache_miss.ns // 1000,
    ),
    ModelMetric("nv_model_load_duration_secs", "gauge", "Time it took to load the version.", lambda m: m.model.load_s),
)

SERVER_READY = "convoy_server_ready"
MODEL_READY = "convoy_model_ready"
REFUSED = "convoy_refused_requests_total"
DECODED = "convoy_decoded_images_total"
DECODING = "convoy_decoding_seconds_total"
MESSAGE_BYTES = "convoy_message_bytes"
MESSAGE_LIMIT = "convoy_message_limit_bytes"
CALLS = "convoy_calls_total"
CALL_DURATION = "convoy_call_duration_seconds"

_OWN = (SERVER_READY, MODEL_READY, REFUSED, DECODED, DECODING, MESSAGE_BYTES, MESSAGE_LIMIT, CALLS, CALL_DURATION)
NAMES = frozenset((*_OWN, *(metric.name for metric in MODEL_METRICS)))
"""All names but prometheus_client's `process_...`. The samples of a histogram add `_bucket`, `_sum` and `_count`."""

_TRITON_TYPE = re.compile(rb"^(# TYPE nv_\w+) counter$", re.MULTILINE)
_TRITON_HEADER = re.compile(rb"^(# (?:HELP|TYPE) nv_\w+)_total ", re.MULTILINE)


class Metrics(Collector):
    """The metrics of a server's models and of its process."""

    def __init__(
        self, repository: Repository, refusals: Refusals, decoder: ImageDecoder, message_memory: MessageMemory
    ) -> None:
        self._message_memory = message_memory
        self._repository = repository
        self._refusals = refusals
        self._decoder = decoder
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def families(self) -> list[Metric]:
        """Returns all metrics as values."""
        return list(self._registry.collect())

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Returns all metrics and their content type.

        Args:
            accept: header of the request: OpenMetrics if it asks for that, else Prometheus's text format 0.0.4.
        """
        return _render(self._registry, accept)

    def describe(self) -> Iterable[Metric]:
        """Returns nothing, so that registration does not read the models, which may not be loaded yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yields all metric families of the models."""
        server = Metric(SERVER_READY, "1 if every model that should be served is ready.", "gauge")
        server.add_sample(SERVER_READY, {}, int(self._repository.is_ready()))
        yield server
        ready = Metric(MODEL_READY, "1 for a version that is ready, 0 for one that is not.", "gauge")
        for entry in self._repository.index(ready_only=False):
            labels = {"model": entry.name, "version": entry.version}
            ready.add_sample(MODEL_READY, labels, int(entry.state == "READY"))
        yield ready
        refused = Metric(
            REFUSED.removesuffix("_total"),
            "Requests that were refused before they reached a model's queue, by reason: the status in lower case, "
            "malformed (no HTTP), timeout (the client sent too slowly) or connections (all were in use). The model is "
            "empty where the request names none that exists.",
            "counter",
        )
        for (reason, model), count in self._refusals.snapshot().items():
            refused.add_sample(REFUSED, {"reason": reason, "model": model}, count)
        yield refused
        yield _single(DECODED, "counter", "Image files decoded.", self._decoder.num_images)
        yield _single(DECODING, "counter", "Time it took, summed over threads.", self._decoder.seconds)
        yield _single(
            MESSAGE_BYTES, "gauge", "Memory of large requests that arrive, wait or run.", self._message_memory.num_bytes
        )
        yield _single(MESSAGE_LIMIT, "gauge", "Largest memory of such requests.", self._message_memory.max_bytes)
        snapshots = [ModelSnapshot(model, model.statistics.snapshot()) for model in self._repository.ready_models()]
        yield from _call_families(self._refusals.calls, snapshots)
        for metric in MODEL_METRICS:
            family = Metric(metric.name.removesuffix("_total"), metric.documentation, metric.kind)
            for snapshot in snapshots:
                labels = {"model": snapshot.model.spec.name, "version": snapshot.model.version}
                _add_samples(family, metric, labels, metric.read(snapshot))
            yield family


class Families(Collector):
    """Metrics that have been collected elsewhere."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Returns them as `Metrics.render` does."""
        registry = CollectorRegistry()
        registry.register(self)
        return _render(registry, accept)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._families


def _render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    encode, content_type = choose_encoder(accept)
    text: bytes = encode(registry)  # it takes registries too
    if content_type.startswith("text/plain"):
        # prometheus_client ends the family name of every counter with `_total`. Triton's counters have no such ending,
        # and with another family name their samples would lose their type.
        return _TRITON_HEADER.sub(rb"\1 ", text), content_type
    return _TRITON_TYPE.sub(rb"\1 unknown", text), content_type  # a counter of OpenMetrics must end with `_total`


def _call_families(calls: Calls, snapshots: Sequence[ModelSnapshot]) -> Iterator[Metric]:
    """Yields the calls by method and status: those that `calls` has, and the inferences of model versions."""
    counter = Metric(
        CALLS.removesuffix("_total"),
        "Calls over gRPC and HTTP, refused ones included, by the names of the RPC and of its status. Calls over HTTP "
        "have the names of the RPCs that do the same. Model and version are empty where a call has none.",
        "counter",
    )
    durations = Metric(CALL_DURATION, "Time from a call's arrival to its answer.", "histogram")

    def add(method: str, status: str, model: str, version: str, value: Latencies) -> None:
        labels = {"method": method, "status": status, "model": model, "version": version}
        counter.add_sample(CALLS, labels, sum(value.counts))
        _add_histogram(durations, CALL_DURATION, labels, Histogram(LATENCY_BOUNDS_S, value.counts, value.seconds))

    for snapshot in snapshots:
        stats, model, version = snapshot.stats, snapshot.model.spec.name, snapshot.model.version
        add(INFER, STATUSES[OK], model, version, Latencies(stats.latency_counts, stats.success.ns * 1e-9))
        for status, failed in stats.failed.items():
            add(INFER, status, model, version, failed)
    for (method, status, model), latencies in calls.snapshot().items():
        add(method, status, model, "", latencies)
    yield counter
    yield durations


def _single(name: str, kind: str, documentation: str, value: float) -> Metric:
    """Returns a metric without labels."""
    family = Metric(name.removesuffix("_total"), documentation, kind)
    family.add_sample(name, {}, value)
    return family


def _add_samples(family: Metric, metric: ModelMetric, labels: dict[str, str], value: Value) -> None:
    if isinstance(value, Histogram):
        _add_histogram(family, metric.name, labels, value)
    elif isinstance(value, Mapping):
        for label, number in value.items():
            family.add_sample(metric.name, {**labels, metric.label: label}, number)
    else:
        family.add_sample(metric.name, labels, value)


def _add_histogram(family: Metric, name: str, labels: dict[str, str], value: Histogram) -> None:
    bounds = [str(float(bound)) for bound in value.bounds] + ["+Inf"]
    for index, (bound, count) in enumerate(zip(bounds, accumulate(value.counts), strict=True)):
        found = value.exemplars.get(index)
        exemplar = None if found is None else Exemplar({"trace_id": found[0]}, *found[1:])
        family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count, exemplar=exemplar)
    family.add_sample(f"{name}_sum", labels, value.total)
    family.add_sample(f"{name}_count", labels, sum(value.counts))
