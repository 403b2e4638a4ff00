"""The dynamic batcher of one model version: queues requests, runs them in batches, distributes the results.

A batch is bounded by rows, not by requests. A free instance takes all queued requests at once, up to the target batch
size; a timer runs only if the model's configuration sets a delay. A full queue refuses requests at once and says when
to retry. Requests that are cancelled or past their deadline before their batch starts are not computed.

Knows no protocol: a `QueuedRequest` knows how to respond.
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
"""Input bytes that may wait for one model version. One request may exceed it, so that every size is accepted."""

_MAX_ERROR_CHARACTERS = 400


class BatcherClosed(Exception):
    """The batcher takes no more requests: its version is being replaced or unloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Sizes of batches and of the queue.

    Args:
        max_batch_size: rows; 0 for a model without a batch dimension, which computes one request at a time.
        target_batch_size: rows up to which a batch is filled; a larger request forms a batch of its own. 0 for
            `max_batch_size`.
        max_queue_delay_us: how long the oldest request may wait for others while an instance is free.
        max_queue_size: number of requests that may wait.
        timeout_us: how long a request may wait; 0 for no limit.
    """

    max_batch_size: int
    target_batch_size: int = 0
    max_queue_delay_us: int = 0
    max_queue_size: int = 1024
    timeout_us: int = 0


class Outputs:
    """The outputs of a batch. Converts each tensor to bytes once, however many requests share it.

    Args:
        rows: size of the batch dimension; None for a model without one, whose outputs belong to a single request.

    Attributes:
        row_shapes: the outputs' shapes without the batch dimension.
    """

    __slots__ = ("_bytes", "_rows", "arrays", "row_shapes")

    def __init__(self, arrays: Sequence[Array], rows: int | None) -> None:
        self.arrays = arrays
        self.row_shapes = [array.shape if rows is None else array.shape[1:] for array in arrays]
        self._rows = rows or 1
        self._bytes: list[bytes | None] = [None] * len(arrays)

    def slice(self, index: int, first_row: int, rows: int) -> Array:
        """Returns some rows of an output."""
        return self.arrays[index] if rows == self._rows else self.arrays[index][first_row : first_row + rows]

    def data(self, index: int, first_row: int, rows: int) -> bytes:
        """Returns the bytes of some rows of an output, as in `serving.protocol.tensors`."""
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


class QueuedRequest(ABC):
    """A request from its arrival to its response: one call of `finish` or `fail`, or none after a cancellation.

    Args:
        buffers: the input tensors in the model's order; their lengths have been checked.
        shapes: the tensors' shapes.
        rows: size of the batch dimension; 1 for a model without one.
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
        """Responds with this request's rows of the outputs."""

    @abstractmethod
    def fail(self, error: ServingError) -> None:
        """Responds with an error."""


class Batcher:
    """Runs one model version, with one thread for each instance."""

    def __init__(self, name: str, backends: Sequence[Backend], limits: BatchLimits, statistics: Statistics) -> None:
        self._name = name
        self._backends = backends
        self._datatypes = tuple(spec.datatype for spec in backends[0].inputs)
        self._limits = limits
        self._max_rows = limits.target_batch_size or max(1, limits.max_batch_size)
        self._statistics = statistics
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[QueuedRequest] = deque()
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
        """Number of requests that wait."""
        return len(self._queue)

    @property
    def num_queued_rows(self) -> int:
        """Number of rows of the requests that wait."""
        return self._queued_rows

    @property
    def num_running(self) -> int:
        """Number of requests whose batch is being computed."""
        return self._num_running

    def oldest_age_s(self) -> float:
        """Returns how long the oldest queued request has waited; 0 if the queue is empty."""
        with self._lock:
            return (time.monotonic_ns() - self._queue[0].arrived_ns) * 1e-9 if self._queue else 0.0

    def submit(self, request: QueuedRequest) -> None:
        """Queues a request.

        Raises:
            ResourceExhausted: the queue is full.
            BatcherClosed: `close` has been called.
        """
        with self._lock:
            if self._is_closing:
                raise BatcherClosed
            if len(self._queue) < self._limits.max_queue_size and self._queued_bytes <= MAX_QUEUED_BYTES:
                self._queue.append(request)
                self._queued_rows += request.rows
                self._queued_bytes += request.num_bytes
                if self._num_idle:
                    self._changed.notify()
                return
            waiting, retry_after_ms = len(self._queue), self._retry_after_ms()
        self._statistics.record_failure("REJECTED")
        raise ResourceExhausted(f"the queue of model '{self._name}' is full: {waiting} requests wait", retry_after_ms)

    def cancel(self, request: QueuedRequest) -> None:
        """Removes a request from the queue. Does nothing if its batch has started."""
        with self._lock:
            try:
                self._queue.remove(request)
            except ValueError:
                return
            self._uncount(request)
        self._statistics.record_failure("CANCELED", 1, time.monotonic_ns() - request.arrived_ns)

    def close(self) -> None:
        """Finishes all queued requests, then ends the threads and closes the backends."""
        with self._lock:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for backend in self._backends:
            backend.close()

    def _retry_after_ms(self) -> int:
        """Estimates when half of the queue will be done; 100 ms before the first batch."""
        seconds = self._ns_per_row * 1e-9 * self._queued_rows / len(self._backends)
        return min(1000, max(1, math.ceil(500 * seconds))) if seconds else 100

    def _uncount(self, request: QueuedRequest) -> None:
        self._queued_rows -= request.rows
        self._queued_bytes -= request.num_bytes

    def _work(self, backend: Backend) -> None:
        while True:
            with self._lock:
                trigger = self._wait_for_batch()
                if trigger is None:
                    return
                requests, expired = self._take_batch()
                self._num_running += len(requests)
                if self._queue:
                    trigger = "full"
                    if self._num_idle:
                        self._changed.notify()
            self._refuse_expired(expired)
            if requests:
                self._run(backend, requests, trigger)
                with self._lock:
                    self._num_running -= len(requests)
            del requests, expired  # else their messages stay in memory until the next batch

    def _refuse_expired(self, expired: list[QueuedRequest]) -> None:
        for request in expired:
            self._fail(request, DeadlineExceeded(f"too late for model '{self._name}': {_waited(request)}"), "REJECTED")

    # `_work` holds the lock when it calls the next two.

    def _wait_for_batch(self) -> BatchTrigger | None:
        """Waits until a batch may start. Returns why, or None if the batcher is closed and empty."""
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

    def _take_batch(self) -> tuple[list[QueuedRequest], list[QueuedRequest]]:
        """Takes from the queue the next batch, and the requests whose time is up."""
        requests: list[QueuedRequest] = []
        expired: list[QueuedRequest] = []
        queue, room, now = self._queue, self._max_rows, time.monotonic()
        oldest_ns = time.monotonic_ns() - 1000 * self._limits.timeout_us if self._limits.timeout_us else 0
        while queue and room > 0:
            request = queue[0]
            if (request.deadline is not None and request.deadline <= now) or request.arrived_ns < oldest_ns:
                expired.append(request)
            elif requests and (request.rows > room or not _fit_together(requests[0].shapes, request.shapes)):
                break
            else:
                room -= request.rows
                requests.append(request)
            queue.popleft()
            self._uncount(request)
        return requests, expired

    def _run(self, backend: Backend, requests: list[QueuedRequest], trigger: BatchTrigger) -> None:
        began = time.monotonic_ns()
        rows = sum(request.rows for request in requests)
        try:
            inputs = [self._gather(index, datatype, requests, rows) for index, datatype in enumerate(self._datatypes)]
            assembled = time.monotonic_ns()
            arrays = backend.run(inputs)
            self._check_rows(arrays, rows)
        except Exception as error:  # a backend may raise anything; only this batch fails
            logger.exception("model '%s' failed on a batch of %d rows", self._name, rows)
            failure = Internal(f"model '{self._name}' failed: {_last_line(error)}")
            for request in requests:
                self._fail(request, failure, "BACKEND")
            return
        computed = time.monotonic_ns()
        arrivals = self._respond(requests, Outputs(arrays, rows if self._limits.max_batch_size else None))
        responded = time.monotonic_ns()
        if arrivals:
            self._statistics.record_batch(arrivals, rows, (began, assembled, computed, responded), trigger)
        self._ns_per_row += 0.1 * ((responded - began) / rows - self._ns_per_row)

    def _gather(self, index: int, datatype: Datatype, requests: list[QueuedRequest], rows: int) -> Array:
        """Returns one input of a batch: a view of a single request's bytes, or one copy of the bytes of several."""
        first = requests[0].shapes[index]
        if len(requests) == 1:
            return to_array(datatype, first, requests[0].buffers[index])
        if not datatype.size:
            return np.concatenate(
                [to_array(datatype, request.shapes[index], request.buffers[index]) for request in requests]
            )
        return to_array(datatype, (rows, *first[1:]), b"".join([request.buffers[index] for request in requests]))

    def _check_rows(self, arrays: Sequence[Array], rows: int) -> None:
        if self._limits.max_batch_size:
            for array in arrays:
                if array.shape[:1] != (rows,):
                    raise ValueError(f"an output has shape {list(array.shape)} for a batch of {rows} rows")

    def _respond(self, requests: list[QueuedRequest], outputs: Outputs) -> list[int]:
        """Gives each request its rows. Returns the arrival times of those that got a response."""
        arrivals = []
        row = 0
        for request in requests:
            try:
                request.finish(outputs, row)
                arrivals.append(request.arrived_ns)
            except ServingError as error:
                self._fail(request, error, "OTHER")
            except Exception:
                logger.exception("model '%s': a response could not be built", self._name)
                self._fail(request, Internal("the response could not be built; the server's log says why"), "OTHER")
            row += request.rows
        return arrivals

    def _fail(self, request: QueuedRequest, error: ServingError, reason: Reason) -> None:
        self._statistics.record_failure(reason, 1, time.monotonic_ns() - request.arrived_ns)
        try:
            request.fail(error)
        except Exception:
            logger.exception("model '%s': an error could not be sent", self._name)


def _fit_together(one: tuple[Shape, ...], other: tuple[Shape, ...]) -> bool:
    """Returns whether requests with these shapes can share a batch."""
    return one is other or all(a[1:] == b[1:] for a, b in zip(one, other, strict=True))


def _last_line(error: Exception) -> str:
    """Returns the last line of a backend's error. The lines before are a traceback, which the log has."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:_MAX_ERROR_CHARACTERS] if lines else type(error).__name__


def _waited(request: QueuedRequest) -> str:
    return f"the request waited {(time.monotonic_ns() - request.arrived_ns) * 1e-6:.0f} ms"
