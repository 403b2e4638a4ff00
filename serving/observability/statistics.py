"""What a model version did: the numbers behind ModelStatistics and /metrics.

Written once a batch, not once a request, so that counting costs next to nothing. As in Triton, the durations of a
batch's parts count for each of its requests, and the number of rows is the number of inferences
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md).
"""

import copy
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
"""Why a request failed, in Triton's words: refused or too late, gone, the model's fault, anything else.

A passed gRPC deadline ends the call as a caller does who goes: CANCELED, but for the job that is taken from the queue
before we hear of it.
"""

BatchTrigger = Literal["full", "idle", "delay"]
"""Why a batch was closed: no more would fit, an instance was free, or the queue delay had passed."""

LATENCY_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, count: int, ns: int) -> None:
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchDurations:
    """All batches of one size: how many, and how long their parts took in all."""

    count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


@dataclass(slots=True)
class Snapshot:
    """The numbers at one moment.

    Args:
        success: requests answered, from arrival to answer.
        fail: requests not answered with a result, from arrival to refusal.
        queue: until a request's batch was closed.
        compute_input: putting the batch together.
        compute_infer: the model.
        compute_output: taking the results apart and answering.
        inference_count: rows computed.
        execution_count: batches computed.
        last_inference_ms: time of the last batch, milliseconds since 1970; 0 before the first.
        latency_counts: successes at most as slow as each of `LATENCY_BOUNDS_S`, and then the slower ones; not
            cumulative.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    batch_sizes: dict[int, BatchDurations] = field(default_factory=dict)
    failures: dict[Reason, int] = field(
        default_factory=lambda: {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0}
    )
    batch_closed: dict[BatchTrigger, int] = field(default_factory=lambda: {"full": 0, "idle": 0, "delay": 0})
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))


class Statistics:
    """The numbers of one model version. Threads may write at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = Snapshot()

    def record_batch(
        self, arrivals_ns: Sequence[int], rows: int, times_ns: tuple[int, int, int, int], closed: BatchTrigger
    ) -> None:
        """Count a batch that succeeded.

        Args:
            arrivals_ns: when each of its requests came, on the clock of `time.monotonic_ns`.
            times_ns: when it was closed, put together, computed and answered, on the same clock.
        """
        began, assembled, computed, answered = times_ns
        jobs = len(arrivals_ns)
        input_ns, infer_ns, output_ns = assembled - began, computed - assembled, answered - computed
        arrived = sum(arrivals_ns)
        slots = [bisect_left(LATENCY_BOUNDS_S, (answered - at) * 1e-9) for at in arrivals_ns]
        with self._lock:
            now = self._now
            now.success.add(jobs, jobs * answered - arrived)
            now.queue.add(jobs, jobs * began - arrived)
            now.compute_input.add(jobs, jobs * input_ns)
            now.compute_infer.add(jobs, jobs * infer_ns)
            now.compute_output.add(jobs, jobs * output_ns)
            now.inference_count += rows
            now.execution_count += 1
            now.last_inference_ms = time.time_ns() // 1_000_000
            size = now.batch_sizes.get(rows)
            if size is None:
                size = now.batch_sizes[rows] = BatchDurations()
            size.count += 1
            size.input_ns += input_ns
            size.infer_ns += infer_ns
            size.output_ns += output_ns
            now.batch_closed[closed] += 1
            counts = now.latency_counts
            for slot in slots:
                counts[slot] += 1

    def record_failure(self, reason: Reason, count: int = 1, ns: int = 0) -> None:
        """Count requests that got no result, and the time since they came, in all."""
        with self._lock:
            self._now.fail.add(count, ns)
            self._now.failures[reason] += count

    def snapshot(self) -> Snapshot:
        """A copy that does not change any more."""
        with self._lock:
            return copy.deepcopy(self._now)
