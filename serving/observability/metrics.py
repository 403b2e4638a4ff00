"""The server's Prometheus metrics, read at the time of the scrape. `model_metrics` lists those of model versions.

Nothing is counted here: a scrape copies the statistics of the batchers and the counts of refused requests. The counters
of a model version that is loaded again start at zero, as after a restart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from serving.inference.decoder import ImageDecoder
from serving.inference.message_memory import MessageMemory
from serving.models.repository import Repository
from serving.observability.calls import MODEL_INFER, Calls
from serving.observability.model_metrics import MODEL_METRICS, Histogram, ModelMetric, ModelSnapshot, Value
from serving.observability.refusals import Refusals
from serving.observability.statistics import LATENCY_BOUNDS_S, Latencies
from serving.protocol.status import OK, STATUS_NAMES

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
        return _render(self, accept)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _render(collector: Collector | CollectorRegistry, accept: str) -> tuple[bytes, str]:
    encode, content_type = choose_encoder(accept)
    text: bytes = encode(collector)
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
        add(MODEL_INFER, STATUS_NAMES[OK], model, version, Latencies(stats.latency_counts, stats.success.ns * 1e-9))
        for status, failed in stats.failed.items():
            add(MODEL_INFER, status, model, version, failed)
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
