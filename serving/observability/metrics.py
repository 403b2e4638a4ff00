"""What Prometheus is told: every name in one table, every number read at the moment of the scrape.

Nothing is counted here: the batchers keep their statistics, and a scrape copies them. Ours are `convoy_...` with their
unit at the end; Triton's `nv_...` are there under Triton's names, so that its dashboards and tools work
(https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md). A model version that is loaded
again begins at zero, as a counter does that Prometheus takes for restarted.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from serving.models.repository import Model, Repository
from serving.observability.statistics import LATENCY_BOUNDS_S, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """A model version at one moment."""

    model: Model
    now: Snapshot

    @property
    def batch_counts(self) -> list[int]:
        """Batches at most as large as each of BATCH_BOUNDS, and then the larger ones; not cumulative."""
        counts = [0] * (len(BATCH_BOUNDS) + 1)
        for rows, batches in self.now.batch_sizes.items():
            counts[bisect_left(BATCH_BOUNDS, rows)] += batches.count
        return counts


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram: the counts between the bounds, not cumulative, one more than bounds; and the sum of the values."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float


Reading = float | Mapping[Any, int] | Buckets


@dataclass(frozen=True, slots=True)
class Entry:
    """A metric of each ready model version.

    Args:
        read: a number; or a number for each value of `label`; or a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    documentation: str
    read: Callable[[ModelSnapshot], Reading]
    label: str = ""


TABLE = (
    Entry(
        "convoy_requests_total",
        "counter",
        "Requests by how they ended: success, rejected (the queue was full, or a time-out over when the turn came), "
        "canceled (the caller had gone or the call's deadline had passed before that), backend (the model failed) or "
        "other.",
        lambda m: {"success": m.now.success.count} | {why.lower(): count for why, count in m.now.failures.items()},
        label="outcome",
    ),
    Entry("convoy_inferences_total", "counter", "Rows computed.", lambda m: m.now.inference_count),
    Entry(
        "convoy_batches_total",
        "counter",
        "Batches computed, by why each was closed: full, idle (an instance was free) or delay (it had waited enough).",
        lambda m: m.now.batch_closed,
        label="closed",
    ),
    Entry(
        "convoy_batch_size_rows",
        "histogram",
        "Rows of a batch.",
        lambda m: Buckets(BATCH_BOUNDS, m.batch_counts, m.now.inference_count),
    ),
    Entry(
        "convoy_request_duration_seconds",
        "histogram",
        "From a request's arrival to its answer; successes only.",
        lambda m: Buckets(LATENCY_BOUNDS_S, m.now.latency_counts, m.now.success.ns * 1e-9),
    ),
    Entry("convoy_queue_requests", "gauge", "Requests that wait.", lambda m: m.model.batcher.num_queued),
    Entry("convoy_queue_rows", "gauge", "Rows that wait.", lambda m: m.model.batcher.num_queued_rows),
    Entry(
        "convoy_queue_oldest_age_seconds",
        "gauge",
        "How long the first request in the queue has waited; 0 when none does.",
        lambda m: m.model.batcher.oldest_age_s(),
    ),
    Entry(
        "convoy_open_requests",
        "gauge",
        "Requests that wait or are being computed.",
        lambda m: m.model.batcher.num_queued + m.model.batcher.num_running,
    ),
    Entry(
        "convoy_model_load_seconds", "gauge", "How long the version took to load and warm.", lambda m: m.model.load_s
    ),
    # Triton's. Durations are in microseconds, over all requests.
    Entry("nv_inference_request_success", "counter", "Requests that succeeded.", lambda m: m.now.success.count),
    Entry(
        "nv_inference_request_failure",
        "counter",
        "Requests that failed, by reason.",
        lambda m: m.now.failures,
        label="reason",
    ),
    Entry("nv_inference_count", "counter", "Rows computed.", lambda m: m.now.inference_count),
    Entry("nv_inference_exec_count", "counter", "Batches computed.", lambda m: m.now.execution_count),
    Entry("nv_inference_pending_request_count", "gauge", "Requests that wait.", lambda m: m.model.batcher.num_queued),
    Entry(
        "nv_inference_request_duration_us",
        "counter",
        "From arrival to answer, successes only.",
        lambda m: m.now.success.ns // 1000,
    ),
    Entry("nv_inference_queue_duration_us", "counter", "Waiting for a batch.", lambda m: m.now.queue.ns // 1000),
    Entry(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Putting batches together.",
        lambda m: m.now.compute_input.ns // 1000,
    ),
    Entry(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Running the model.",
        lambda m: m.now.compute_infer.ns // 1000,
    ),
    Entry(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Taking results apart and answering.",
        lambda m: m.now.compute_output.ns // 1000,
    ),
    Entry("nv_model_load_duration_secs", "gauge", "How long the version took to load.", lambda m: m.model.load_s),
)

SERVER_READY = "convoy_server_ready"
MODEL_READY = "convoy_model_ready"

NAMES = frozenset({SERVER_READY, MODEL_READY, *(entry.name for entry in TABLE)})
"""All but prometheus_client's `process_...`. A histogram's samples are these with `_bucket`, `_sum` and `_count`."""


class Metrics(Collector):
    """The metrics of one server's models and of its process."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def render(self) -> bytes:
        """All of it in Prometheus's text format 0.0.4."""
        return "".join(_lines(self._registry.collect())).encode()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read the models, which may not be loaded yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The families, with samples named as they will be exposed."""
        server = Metric(SERVER_READY, "1 when every model asked for is ready.", "gauge")
        server.add_sample(SERVER_READY, {}, int(self._repository.is_ready()))
        yield server
        ready = Metric(
            MODEL_READY, "1 for a version that serves, 0 for one that could not be loaded or is not wanted.", "gauge"
        )
        for version in self._repository.index(ready_only=False):
            labels = {"model": version.name, "version": version.version}
            ready.add_sample(MODEL_READY, labels, int(version.state == "READY"))
        yield ready
        moments = [ModelSnapshot(model, model.statistics.snapshot()) for model in self._repository.ready_models()]
        for entry in TABLE:
            family = Metric(entry.name, entry.documentation, entry.kind)
            for moment in moments:
                labels = {"model": moment.model.spec.name, "version": moment.model.version}
                _add(family, entry, labels, entry.read(moment))
            yield family


def _add(family: Metric, entry: Entry, labels: dict[str, str], reading: Reading) -> None:
    if isinstance(reading, Buckets):
        ends = [str(float(bound)) for bound in reading.bounds] + ["+Inf"]
        for end, count in zip(ends, accumulate(reading.counts), strict=True):
            family.add_sample(f"{entry.name}_bucket", {**labels, "le": end}, count)
        family.add_sample(f"{entry.name}_sum", labels, reading.total)
        family.add_sample(f"{entry.name}_count", labels, sum(reading.counts))
    elif isinstance(reading, Mapping):
        for value, number in reading.items():
            family.add_sample(entry.name, {**labels, entry.label: value}, number)
    else:
        family.add_sample(entry.name, labels, reading)


def _lines(families: Iterable[Metric]) -> Iterator[str]:
    """Text format 0.0.4. prometheus_client's own writer would add `_total` to Triton's counters, which have none."""
    for family in families:
        name = family.name
        if family.type == "counter" and family.samples:
            name = family.samples[0].name
        documentation = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {name} {documentation}\n# TYPE {name} {family.type}\n"
        for sample in family.samples:
            labels = ",".join(f'{label}="{_escape(value)}"' for label, value in sample.labels.items())
            yield f"{sample.name}{f'{{{labels}}}' if labels else ''} {sample.value}\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
