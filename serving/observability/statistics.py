"""Statistics of a model version: the numbers behind the ModelStatistics RPC and /metrics.

Recorded once per batch, not once per request, so that counting costs little. As in Triton, each request of a batch
counts with the durations of the whole batch, and each row counts as one inference
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md).
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
"""The reason why a request failed, in Triton's words.

REJECTED: the queue was full, the request's deadline had passed when its turn came, or all instances hang. CANCELED: the
client cancelled the call, or its gRPC deadline passed while the request waited. BACKEND: the model failed or hangs.
OTHER: any other error. `serving.observability.refusals` counts what never reaches a queue.
"""

BatchTrigger = Literal["full", "idle", "delay"]
"""The reason why a batch was closed: no more rows fit, an instance was idle, or the queue delay was over."""

LATENCY_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True)
class Duration:
    """A number of events and their total duration."""

    count: int = 0
    ns: int = 0

    def add(self, count: int, ns: int) -> None:
        self.count += count
        self.ns += ns

    def copy(self) -> "Duration":
        return Duration(self.count, self.ns)


@dataclass(slots=True)
class BatchDurations:
    """The number of batches of one size, and the total duration of each of their phases."""

    count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0

    def copy(self) -> "BatchDurations":
        return BatchDurations(self.count, self.input_ns, self.infer_ns, self.output_ns)


@dataclass(slots=True)
class Latencies:
    """Requests and how long they took.

    Args:
        counts: requests in each interval between `LATENCY_BOUNDS_S`, the last one open-ended; not cumulative.
        seconds: the sum of their durations.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.seconds += seconds

    def copy(self) -> "Latencies":
        return Latencies(self.counts.copy(), self.seconds)


@dataclass(slots=True)
class Snapshot:
    """The statistics at one moment.

    Args:
        success: requests that succeeded, from arrival to response.
        fail: requests that failed, from arrival to error.
        queue: from a request's arrival, or from the decoding of its image files, until its batch was closed.
        compute_input: assembling the batch.
        compute_infer: running the model.
        compute_output: splitting the outputs and sending the responses.
        cache_hit: requests that the response cache answered, and looking them up. They count as successes, too.
        cache_miss: requests that it did not answer, looking them up, and adding what was computed.
        inference_count: rows computed.
        execution_count: batches computed.
        last_inference_ms: time of the last batch in milliseconds since 1970; 0 before the first.
        batch_sizes: by number of rows.
        failures: number of failed requests by reason.
        batch_triggers: number of batches by what closed them.
        latency_counts: successful requests in each interval between `LATENCY_BOUNDS_S`, the last one open-ended; not
            cumulative.
        failed: the same for requests that failed, by the name of their gRPC status.
        exemplars: the last traced request in each of these intervals, by its index: its trace's id, how many seconds it
            took, and when it was answered, in seconds since 1970.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    batch_sizes: dict[int, BatchDurations] = field(default_factory=dict)
    failures: dict[Reason, int] = field(
        default_factory=lambda: {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0}
    )
    batch_triggers: dict[BatchTrigger, int] = field(default_factory=lambda: {"full": 0, "idle": 0, "delay": 0})
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    failed: dict[str, Latencies] = field(default_factory=dict)
    exemplars: dict[int, tuple[str, float, float]] = field(default_factory=dict)

    def copy(self) -> "Snapshot":
        """Returns an independent copy. Batches wait for it, and `copy.deepcopy` takes 20 to 35 times as long."""
        return replace(
            self,
            success=self.success.copy(),
            fail=self.fail.copy(),
            queue=self.queue.copy(),
            compute_input=self.compute_input.copy(),
            compute_infer=self.compute_infer.copy(),
            compute_output=self.compute_output.copy(),
            cache_hit=self.cache_hit.copy(),
            cache_miss=self.cache_miss.copy(),
            batch_sizes={rows: durations.copy() for rows, durations in self.batch_sizes.items()},
            failures=self.failures.copy(),
            batch_triggers=self.batch_triggers.copy(),
            latency_counts=self.latency_counts.copy(),
            failed={status: latencies.copy() for status, latencies in self.failed.items()},
            exemplars=self.exemplars.copy(),
        )


class Statistics:
    """Records the statistics of one model version. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = Snapshot()

    def record_batch(
        self,
        arrivals_ns: Sequence[int],
        rows: int,
        times_ns: tuple[int, int, int, int],
        trigger: BatchTrigger,
        decoding_ns: int = 0,
    ) -> None:
        """Records a batch that succeeded.

        Args:
            arrivals_ns: when each of its requests arrived, on the clock of `time.monotonic_ns`.
            times_ns: when it was closed, assembled, computed and answered, on the same clock.
            decoding_ns: of all its requests, from their arrival until their image files were decoded.
        """
        closed, assembled, computed, answered = times_ns
        requests = len(arrivals_ns)
        input_ns, infer_ns, output_ns = assembled - closed, computed - assembled, answered - computed
        arrived = sum(arrivals_ns)
        intervals = [bisect_left(LATENCY_BOUNDS_S, (answered - at) * 1e-9) for at in arrivals_ns]
        with self._lock:
            totals = self._totals
            totals.success.add(requests, requests * answered - arrived)
            totals.queue.add(requests, requests * closed - arrived - decoding_ns)
            totals.compute_input.add(requests, requests * input_ns)
            totals.compute_infer.add(requests, requests * infer_ns)
            totals.compute_output.add(requests, requests * output_ns)
            totals.inference_count += rows
            totals.execution_count += 1
            totals.last_inference_ms = time.time_ns() // 1_000_000
            size = totals.batch_sizes.get(rows)
            if size is None:
                size = totals.batch_sizes[rows] = BatchDurations()
            size.count += 1
            size.input_ns += input_ns
            size.infer_ns += infer_ns
            size.output_ns += output_ns
            totals.batch_triggers[trigger] += 1
            counts = totals.latency_counts
            for interval in intervals:
                counts[interval] += 1

    def record_failure(self, reason: Reason, status: str, ns: int = 0) -> None:
        """Records a failed request.

        Args:
            status: name of its gRPC status.
            ns: time since its arrival.
        """
        with self._lock:
            totals = self._totals
            totals.fail.add(1, ns)
            totals.failures[reason] += 1
            if status not in totals.failed:
                totals.failed[status] = Latencies()
            totals.failed[status].add(ns * 1e-9)

    def record_cache_hit(self, arrived_ns: int, answered_ns: int) -> None:
        """Records a request that the response cache has answered, on the clock of `time.monotonic_ns`."""
        ns = answered_ns - arrived_ns
        with self._lock:
            totals = self._totals
            totals.success.add(1, ns)
            totals.queue.add(1, 0)
            totals.cache_hit.add(1, ns)
            totals.latency_counts[bisect_left(LATENCY_BOUNDS_S, ns * 1e-9)] += 1

    def record_cache_miss(self, count: int, ns: int) -> None:
        """Records requests that the response cache has not answered, or the time that it took to add responses."""
        with self._lock:
            self._totals.cache_miss.add(count, ns)

    def record_exemplar(self, trace_id: str, ns: int) -> None:
        """Records that a request is traced.

        Args:
            ns: from its arrival to its response.
        """
        seconds = ns * 1e-9
        with self._lock:
            self._totals.exemplars[bisect_left(LATENCY_BOUNDS_S, seconds)] = (trace_id, seconds, time.time())

    def snapshot(self) -> Snapshot:
        """Returns a copy of the statistics that later batches do not change."""
        with self._lock:
            return self._totals.copy()
