"""The Prometheus metrics of each model version: one table of their names, and how each is read.

Metrics of our own are named `convoy_...` and end with their unit. Triton's are exposed under Triton's names (`nv_...`),
for dashboards and tools made for Triton
(https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serving.models.repository import Model
from serving.observability.statistics import LATENCY_BOUNDS_S, Snapshot

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
