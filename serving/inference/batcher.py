"""The dynamic batcher of one model version: requests in, batches through the model, answers out.

Counts rows, not requests. Works whenever it can: an instance that is free takes what waits, up to the number of rows
that is computed best; there is no timer unless the model's configuration sets a delay. Bounded: a full queue refuses at
once, and says when to come again. What is cancelled or too late by the time its batch is closed costs nothing.

Knows no protocol: a `Job` says how it is answered.
"""

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.backends import Backend
from serving.errors import DeadlineExceeded, Internal, ResourceExhausted, ServingError
from serving.observability.statistics import BatchTrigger, Reason, Statistics
from serving.protocol.tensors import Array, Buffer, Datatype, Shape, to_array, to_bytes

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 256 << 20
"""Of inputs, for one model: the queue is bounded in memory too, whatever the size of a request."""

_MAX_ERROR_CHARACTERS = 400


class BatcherClosed(Exception):
    """The batcher is draining: a newer version of the model takes over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How batches are made.

    Args:
        max_batch_size: rows; 0 for a model without a batch dimension, which gets one request at a time.
        target_batch_size: what a batch is filled up to; a request with more rows goes alone. 0 for the largest batch.
        max_queue_delay_us: how long the first request may wait for others while an instance is free.
        max_queue_size: requests that may wait.
        timeout_us: how long a request may wait; 0 for ever.
    """

    max_batch_size: int
    target_batch_size: int = 0
    max_queue_delay_us: int = 0
    max_queue_size: int = 1024
    timeout_us: int = 0


class Outputs:
    """The results of a batch, cut apart. Each tensor is turned to bytes once, however many requests share it.

    Args:
        rows: of the batch dimension; None for a model without one, whose outputs all belong to one request.
        row_shapes: the outputs' shapes without the batch dimension.
    """

    __slots__ = ("_bytes", "_rows", "arrays", "row_shapes")

    def __init__(self, arrays: Sequence[Array], rows: int | None) -> None:
        self.arrays = arrays
        self.row_shapes = [array.shape if rows is None else array.shape[1:] for array in arrays]
        self._rows = rows or 1
        self._bytes: list[bytes | None] = [None] * len(arrays)

    def slice(self, index: int, first_row: int, rows: int) -> Array:
        """Some rows of an output."""
        return self.arrays[index] if rows == self._rows else self.arrays[index][first_row : first_row + rows]

    def data(self, index: int, first_row: int, rows: int) -> bytes:
        """The same as it goes over the wire."""
        whole = self._bytes[index]
        if whole is None:
            array = self.arrays[index]
            if array.dtype == object:
                return to_bytes(self.slice(index, first_row, rows))
            whole = self._bytes[index] = array.tobytes()
        if rows == self._rows:
            return whole
        row_size = len(whole) // self._rows
        return whole[first_row * row_size : (first_row + rows) * row_size]


class Job(ABC):
    """One request, from its arrival to its answer: exactly one call of `finish` or `fail`, or none after a cancel.

    Args:
        buffers: the input tensors in the model's order, valid and of the right lengths.
        shapes: their shapes.
        rows: of the batch dimension; 1 for a model without.
        deadline: on the clock of `time.monotonic`; None for none.
    """

    __slots__ = ("arrived_ns", "buffers", "deadline", "num_bytes", "rows", "shapes")

    def __init__(
        self, buffers: tuple[Buffer, ...], shapes: tuple[Shape, ...], rows: int, deadline: float | None
    ) -> None:
        self.buffers = buffers
        self.shapes = shapes
        self.rows = rows
        self.deadline = deadline
        self.arrived_ns = time.monotonic_ns()
        self.num_bytes = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))

    @abstractmethod
    def finish(self, outputs: Outputs, first_row: int) -> None:
        """Answer with this job's rows of the outputs."""

    @abstractmethod
    def fail(self, error: ServingError) -> None:
        """Answer with an error."""


class Batcher:
    """Batches for the instances of one model version; one thread an instance."""

    def __init__(self, name: str, backends: Sequence[Backend], limits: BatchLimits, statistics: Statistics) -> None:
        self._name = name
        self._backends = backends
        self._datatypes = tuple(spec.datatype for spec in backends[0].inputs)
        self._limits = limits
        self._max_rows = limits.target_batch_size or max(1, limits.max_batch_size)
        self._statistics = statistics
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[Job] = deque()
        self._queued_rows = 0
        self._queued_bytes = 0
        self._num_idle = 0
        self._num_running = 0
        self._is_closing = False
        self._ns_per_row = 0.0
        self._threads = [
            threading.Thread(target=self._work, args=(backend,), name=f"{name}-{index}", daemon=True)
            for index, backend in enumerate(backends)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def num_queued_rows(self) -> int:
        return self._queued_rows

    @property
    def num_running(self) -> int:
        """Requests whose batch is being computed."""
        return self._num_running

    def oldest_age_s(self) -> float:
        """How long the first request in the queue has waited; 0 when none does."""
        with self._lock:
            return (time.monotonic_ns() - self._queue[0].arrived_ns) * 1e-9 if self._queue else 0.0

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ResourceExhausted: the queue is full.
            BatcherClosed: `close` was called.
        """
        with self._lock:
            if self._is_closing:
                raise BatcherClosed
            if len(self._queue) < self._limits.max_queue_size and self._queued_bytes <= MAX_QUEUED_BYTES:
                self._queue.append(job)
                self._queued_rows += job.rows
                self._queued_bytes += job.num_bytes
                if self._num_idle:
                    self._changed.notify()
                return
            waiting, retry_after_ms = len(self._queue), self._retry_after_ms()
        self._statistics.record_failure("REJECTED")
        raise ResourceExhausted(f"the queue of model '{self._name}' is full: {waiting} requests wait", retry_after_ms)

    def cancel(self, job: Job) -> None:
        """Drop a job whose caller has gone. One whose batch is already closed is computed with its neighbours."""
        with self._lock:
            try:
                self._queue.remove(job)
            except ValueError:
                return
            self._forget(job)
        self._statistics.record_failure("CANCELED", 1, time.monotonic_ns() - job.arrived_ns)

    def close(self) -> None:
        """Finish all that was submitted, then end the threads and close the backends."""
        with self._lock:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for backend in self._backends:
            backend.close()

    def _retry_after_ms(self) -> int:
        """About when half of the queue will be gone; a tenth of a second while nothing is known."""
        seconds = self._ns_per_row * 1e-9 * self._queued_rows / len(self._backends)
        return min(1000, max(1, math.ceil(500 * seconds))) if seconds else 100

    def _forget(self, job: Job) -> None:
        self._queued_rows -= job.rows
        self._queued_bytes -= job.num_bytes

    def _work(self, backend: Backend) -> None:
        while True:
            with self._lock:
                closed = self._wait_for_batch()
                if closed is None:
                    return
                jobs, late = self._take()
                self._num_running += len(jobs)
                if self._queue:
                    closed = "full"
                    if self._num_idle:
                        self._changed.notify()
            self._refuse(late)
            if jobs:
                self._run(backend, jobs, closed)
                with self._lock:
                    self._num_running -= len(jobs)
            del jobs, late  # with their messages, which would stay until the next batch

    def _refuse(self, late: list[Job]) -> None:
        for job in late:
            self._fail(job, DeadlineExceeded(f"too late for model '{self._name}': {_waited(job)}"), "REJECTED")

    def _wait_for_batch(self) -> BatchTrigger | None:
        """Wait until a batch is due; why it is, or None when the batcher is closed and empty. The lock is held."""
        self._num_idle += 1
        try:
            while not self._queue:
                if self._is_closing:
                    return None
                self._changed.wait()
            if not self._limits.max_queue_delay_us:
                return "idle"
            while self._queue and self._queued_rows < self._max_rows and not self._is_closing:
                left = self._queue[0].arrived_ns + 1000 * self._limits.max_queue_delay_us - time.monotonic_ns()
                if left <= 0:
                    return "delay"
                self._changed.wait(left * 1e-9)
            return "full"
        finally:
            self._num_idle -= 1

    def _take(self) -> tuple[list[Job], list[Job]]:
        """The next batch, and the jobs that are too late for it. The lock is held."""
        jobs: list[Job] = []
        late: list[Job] = []
        queue, room, now = self._queue, self._max_rows, time.monotonic()
        oldest_ns = time.monotonic_ns() - 1000 * self._limits.timeout_us if self._limits.timeout_us else 0
        while queue and room > 0:
            job = queue[0]
            if (job.deadline is not None and job.deadline <= now) or job.arrived_ns < oldest_ns:
                late.append(job)
            elif jobs and (job.rows > room or not _fit_together(jobs[0].shapes, job.shapes)):
                break
            else:
                room -= job.rows
                jobs.append(job)
            queue.popleft()
            self._forget(job)
        return jobs, late

    def _run(self, backend: Backend, jobs: list[Job], closed: BatchTrigger) -> None:
        began = time.monotonic_ns()
        rows = sum(job.rows for job in jobs)
        try:
            inputs = [self._gather(index, datatype, jobs, rows) for index, datatype in enumerate(self._datatypes)]
            assembled = time.monotonic_ns()
            arrays = backend.run(inputs)
            self._check(arrays, rows)
        except Exception as error:  # whatever a backend throws is this batch's failure and nobody else's
            logger.exception("model '%s' failed on a batch of %d rows", self._name, rows)
            failure = Internal(f"model '{self._name}' failed: {_last_line(error)}")
            for job in jobs:
                self._fail(job, failure, "BACKEND")
            return
        computed = time.monotonic_ns()
        arrivals = self._answer(jobs, Outputs(arrays, rows if self._limits.max_batch_size else None))
        answered = time.monotonic_ns()
        if arrivals:
            self._statistics.record_batch(arrivals, rows, (began, assembled, computed, answered), closed)
        self._ns_per_row += 0.1 * ((answered - began) / rows - self._ns_per_row)

    def _gather(self, index: int, datatype: Datatype, jobs: list[Job], rows: int) -> Array:
        """One input of the whole batch: a view of the only job's bytes, or one copy of all."""
        first = jobs[0].shapes[index]
        if len(jobs) == 1:
            return to_array(datatype, first, jobs[0].buffers[index])
        if not datatype.size:
            return np.concatenate([to_array(datatype, job.shapes[index], job.buffers[index]) for job in jobs])
        return to_array(datatype, (rows, *first[1:]), b"".join([job.buffers[index] for job in jobs]))

    def _check(self, arrays: Sequence[Array], rows: int) -> None:
        if self._limits.max_batch_size:
            for array in arrays:
                if array.shape[:1] != (rows,):
                    raise ValueError(f"an output has shape {list(array.shape)} for a batch of {rows} rows")

    def _answer(self, jobs: list[Job], outputs: Outputs) -> list[int]:
        """Give each job its rows. Returns when each that got an answer had arrived."""
        arrivals = []
        row = 0
        for job in jobs:
            try:
                job.finish(outputs, row)
                arrivals.append(job.arrived_ns)
            except ServingError as error:
                self._fail(job, error, "OTHER")
            except Exception:
                logger.exception("model '%s': an answer could not be made", self._name)
                self._fail(job, Internal("the answer could not be made"), "OTHER")
            row += job.rows
        return arrivals

    def _fail(self, job: Job, error: ServingError, reason: Reason) -> None:
        self._statistics.record_failure(reason, 1, time.monotonic_ns() - job.arrived_ns)
        try:
            job.fail(error)
        except Exception:
            logger.exception("model '%s': an error could not be answered", self._name)


def _fit_together(one: tuple[Shape, ...], other: tuple[Shape, ...]) -> bool:
    """Whether tensors of these shapes can be rows of one batch."""
    return one is other or all(a[1:] == b[1:] for a, b in zip(one, other, strict=True))


def _last_line(error: Exception) -> str:
    """What a backend's error comes to; the lines before are tracebacks, and stand in the log."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:_MAX_ERROR_CHARACTERS] if lines else type(error).__name__


def _waited(job: Job) -> str:
    return f"the request waited {(time.monotonic_ns() - job.arrived_ns) * 1e-6:.0f} ms"
