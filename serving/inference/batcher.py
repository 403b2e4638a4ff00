"""The dynamic batcher of one model version: queues requests, and runs them in batches.

A batch is bounded by rows, not by requests. A free instance takes all queued requests at once, up to the target batch
size; a timer runs only if the model's configuration sets a delay. A full queue refuses requests at once and says when
to retry. Requests that are cancelled or past their deadline before their batch starts are not computed.

A batch that takes longer than its time limit makes its instance unhealthy until the backend returns. Its requests get
an error, and the other instances serve on; without any, the batcher is unhealthy and refuses requests.

An instance whose batches fail one after the other is checked with the version's own sample. If that fails, too, the
instance is broken: it gets no more batches, and repeats the check, with growing pauses, until it passes.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import zip_longest

from serving.backends import Backend
from serving.errors import DeadlineExceeded, ResourceExhausted, ServingError, Unavailable
from serving.inference.batch import ComputedBatch, QueuedRequest
from serving.inference.instance import MAX_FAILED_BATCHES, Instance, RunOverdue
from serving.inference.priority_queue import PriorityQueue
from serving.inference.rate_limiter import Turn
from serving.inference.request_queue import BatchLimits, RequestQueue
from serving.inference.responder import Responder, ResponseThread
from serving.inference.response_cache import VersionCache
from serving.inference.watchdog import Watchdog
from serving.observability.statistics import BatchTrigger, Statistics
from serving.protocol.status import status_name

logger = logging.getLogger(__name__)

_JOIN_S = 0.05
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0
"""Between two checks of an instance that is broken."""


class BatcherClosed(Exception):
    """The batcher takes no more requests: its version is being replaced or unloaded."""


class Batcher:
    """Runs one model version, with one thread for each instance.

    Args:
        cache: of the version's responses; None for none.
        turns: of the instances, if they wait for resources.
        check: raises an error if a backend is broken; None for no check.

    Raises:
        RuntimeError: the process has no more threads. The backends are closed.

    Attributes:
        on_health_change: called after every change of `is_healthy`, on any thread.
        watch: called with every batch and the time of its answer, while somebody watches; it must neither block nor
            raise.
    """

    def __init__(  # noqa: PLR0913 (all that a version has)
        self,
        name: str,
        backends: Sequence[Backend],
        limits: BatchLimits,
        statistics: Statistics,
        cache: VersionCache | None = None,
        turns: Sequence[Turn] = (),
        check: Callable[[Backend], object] | None = None,
    ) -> None:
        self.on_health_change: Callable[[], None] = lambda: None
        self.watch: Callable[[ComputedBatch, int], None] | None = None
        self._name = name
        self._backends = backends
        self._limits = limits
        self._statistics = statistics
        self._cache = cache
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue = RequestQueue(limits) if limits.policies is None else PriorityQueue(limits)
        self._num_idle = 0
        self._num_running = 0
        self._is_closing = False
        self._is_open = True  # neither closing nor unhealthy
        self._ns_per_row = 0.0
        self._stopping = threading.Event()
        self._responder = Responder(name, statistics, cache)
        self._instances = [
            Instance(name, backend, limits.max_batch_size > 0, check, turn)
            for backend, turn in zip_longest(backends, turns)
        ]
        self._response_thread: ResponseThread | None = None
        self._watchdog: Watchdog | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(instance,), name=f"{name}-{index}", daemon=True)
            for index, instance in enumerate(self._instances)
        ]
        self._start()

    @property
    def num_queued(self) -> int:
        """Number of requests that wait."""
        return len(self._queue.requests)

    @property
    def num_queued_rows(self) -> int:
        """Number of rows of the requests that wait."""
        return self._queue.num_rows

    @property
    def num_running(self) -> int:
        """Number of requests whose batch is being computed."""
        return self._num_running

    @property
    def num_hung(self) -> int:
        """Number of instances whose batch has exceeded its time limit."""
        return sum(instance.is_hung for instance in self._instances)

    @property
    def num_broken(self) -> int:
        """Number of instances that have failed their check."""
        return sum(bool(instance.failure) for instance in self._instances)

    @property
    def failure(self) -> str:
        """Why the batcher is unhealthy; empty if it is not."""
        if self.is_healthy:
            return ""
        broken = [instance.failure for instance in self._instances if not instance.is_hung]
        if not broken:
            return "hangs: no instance finished its batch in time"
        return f"is broken: its batches fail, and so does its own check: {broken[0]}"

    @property
    def resource_wait_s(self) -> float:
        """How long instances with a batch have waited for resources, summed over the instances."""
        return sum(instance.turn.waited_s for instance in self._instances if instance.turn is not None)

    @property
    def is_healthy(self) -> bool:
        """Whether an instance is left that neither hangs nor is broken."""
        return not all(instance.is_hung or instance.failure for instance in self._instances)

    def oldest_age_s(self) -> float:
        """Returns how long the oldest queued request has waited; 0 if the queue is empty."""
        with self._lock:
            queue = self._queue
            return (time.monotonic_ns() - queue.oldest_ns()) * 1e-9 if queue.requests else 0.0

    def submit(self, request: QueuedRequest) -> None:
        """Queues a request, or answers it from the cache.

        Raises:
            ResourceExhausted: the queue is full.
            Unavailable: all instances hang or are broken.
            BatcherClosed: `close` has been called.
        """
        if self._cache is not None and self._is_open and (outputs := self._cache.find(request)) is not None:
            self._responder.respond_from_cache(request, outputs)
            return
        with self._lock:
            if self._is_open and self._queue.add(request):
                if self._num_idle:
                    self._changed.notify()
                return
            if self._is_closing:
                raise BatcherClosed
            error = self._refusal()
        self._statistics.record_failure("REJECTED", status_name(error))
        raise error

    def answer_from_cache(self, request: QueuedRequest) -> bool:
        """Answers a request that has no buffers yet, if its outputs are in the cache. Returns whether they are."""
        outputs = self._cache.look_up(request) if self._cache is not None and self._is_open else None
        if outputs is not None:
            self._responder.respond_from_cache(request, outputs)
        return outputs is not None

    def cancel(self, request: QueuedRequest) -> None:
        """Removes a request from the queue. Does nothing if its batch has started."""
        with self._lock:
            if not self._queue.remove(request):
                return
        self._statistics.record_failure("CANCELED", "CANCELLED", time.monotonic_ns() - request.arrived_ns)

    def close(self) -> None:
        """Finishes all queued requests, then ends the threads and closes the backends.

        An instance that hangs is left behind: its thread ends when its backend returns.
        """
        with self._lock:
            self._is_closing, self._is_open = True, False
            self._changed.notify_all()
        self._stopping.set()
        for instance, thread in zip(self._instances, self._threads, strict=True):
            while thread.is_alive() and not instance.is_hung:
                thread.join(_JOIN_S)
        if num_hung := self.num_hung:
            logger.error("model '%s': %d instances hang and keep their threads and memory", self._name, num_hung)
        if self._cache is not None:
            self._cache.close()
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._response_thread is not None:
            self._response_thread.close()

    # ---- The queue. `_lock` is held ---------------------------------------------------------------------------------

    def _refusal(self) -> ServingError:
        """Returns why a request cannot be queued, with an estimate of when half of the queue will be done."""
        if not self._is_open:
            return self._unhealthy_error()
        seconds = self._ns_per_row * 1e-9 * self._queue.num_rows / len(self._instances)
        retry_after_ms = min(1000, max(1, math.ceil(500 * seconds))) if seconds else 100
        waiting = len(self._queue.requests)
        return ResourceExhausted(f"the queue of model '{self._name}' is full: {waiting} requests wait", retry_after_ms)

    def _unhealthy_error(self) -> Unavailable:
        return Unavailable(f"model '{self._name}' {self.failure}")

    def _wait_for_batch(self) -> BatchTrigger | None:
        """Waits until a batch may start. Returns why, or None if the batcher is closed and empty."""
        queue = self._queue
        self._num_idle += 1
        try:
            while not queue.requests:
                if self._is_closing:
                    return None
                self._changed.wait()
            if not self._limits.max_queue_delay_us:
                return "idle"
            while queue.requests and queue.num_rows < queue.max_rows and not self._is_closing:
                left = queue.oldest_ns() + 1000 * self._limits.max_queue_delay_us - time.monotonic_ns()
                if left <= 0:
                    return "delay"
                self._changed.wait(left * 1e-9)
            return "full"
        finally:
            self._num_idle -= 1

    # ---- The threads -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        limit_s = self._limits.batch_timeout_s
        try:
            if any(backend.uses_gpu for backend in self._backends):
                self._response_thread = ResponseThread(self._name, self._answer, 2 * len(self._backends))
            if limit_s:
                self._watchdog = Watchdog(self._name, self._instances, limit_s, self._lock, self._abandon)
            self._respond = self._answer if self._response_thread is None else self._response_thread.hand_over
            for thread in self._threads:
                thread.start()
        except RuntimeError:
            self.close()
            for thread in self._threads:
                if thread.ident is None:  # it has not started: this one frees its instance
                    thread.run()
            raise

    def _work(self, instance: Instance) -> None:
        run = self._run_next_batch if instance.turn is None else self._run_in_turn
        is_closed = False
        while not is_closed:
            try:
                is_closed = not run(instance)
                if not is_closed and instance.num_failed >= MAX_FAILED_BATCHES and instance.may_check():
                    is_closed = not self._examine(instance)
            except RunOverdue:
                self._recover(instance)
            except BaseException:  # a bug: the thread must live on
                logger.exception("model '%s': a batch was lost", self._name)
        instance.close()

    def _run_in_turn(self, instance: Instance) -> bool:
        """As `_run_next_batch`, of an instance that waits for resources, too. Another one may take its batch."""
        assert instance.turn is not None
        with self._lock:
            trigger = self._wait_for_batch()
        if trigger is None:
            return False
        with instance.turn:
            return self._run_next_batch(instance, trigger)

    def _run_next_batch(self, instance: Instance, trigger: BatchTrigger | None = None) -> bool:
        """Waits for a batch, computes it and responds. Returns False if the batcher is closed and empty.

        Args:
            trigger: of a batch for which the caller has waited.
        """
        with self._lock:
            if trigger is None:
                trigger = self._wait_for_batch()
            if trigger is None:
                return False
            requests, expired = self._queue.take_batch()
            self._num_running += len(requests)
            if self._queue.requests:
                trigger = "full"
                if self._num_idle:
                    self._changed.notify()
        for request in expired:
            waited_ms = (time.monotonic_ns() - request.queued_ns) * 1e-6
            error = DeadlineExceeded(f"too late for model '{self._name}': the request waited {waited_ms:.0f} ms")
            self._responder.fail(request, error, "REJECTED")
        if requests:
            for result in instance.run_batch(requests, trigger):
                if isinstance(result, ComputedBatch):
                    self._respond(result)
                else:
                    self._fail_batch(result.requests, result.error)
        return True

    def _answer(self, batch: ComputedBatch) -> None:
        answered_ns = self._responder.respond(batch)
        if (watch := self.watch) is not None:
            watch(batch, answered_ns)
        self._ns_per_row += 0.1 * ((answered_ns - batch.times_ns[0]) / batch.rows - self._ns_per_row)
        with self._lock:
            self._num_running -= len(batch.requests)

    def _fail_batch(self, requests: Sequence[QueuedRequest], error: ServingError) -> None:
        for request in requests:
            self._responder.fail(request, error, "BACKEND")
        with self._lock:
            self._num_running -= len(requests)

    # ---- Instances that hang, or are broken --------------------------------------------------------------------------

    def _abandon(self, instance: Instance, requests: Sequence[QueuedRequest]) -> None:
        """Answers for an instance that hangs, and for the queue if it was the last one."""
        limit_s = self._limits.batch_timeout_s
        error = DeadlineExceeded(f"model '{self._name}' did not finish the batch within {limit_s:g} s")
        if instance.turn is not None:  # first of all: the instance may return, and take its next turn
            instance.turn.end()
        logger.error("model '%s': an instance hangs: its batch takes longer than %g s", self._name, limit_s)
        self._fail_batch(requests, error)
        self._refuse_if_unhealthy()

    def _examine(self, instance: Instance) -> bool:
        """Checks an instance whose batches fail, and keeps it from others until its check passes.

        Returns:
            False if the batcher is closed before that.
        """
        pause_s = _FIRST_PAUSE_S
        while failure := self._check(instance):
            with self._lock:
                is_known = bool(instance.failure) and not instance.is_hung
                instance.is_hung, instance.failure = False, failure
            if not is_known:
                logger.error("model '%s': an instance is broken: %s", self._name, failure)
                self._refuse_if_unhealthy()
            if self._stopping.wait(pause_s):
                return False
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        if instance.failure:
            self._recover(instance)
        return True

    def _check(self, instance: Instance) -> str:
        """Returns why the check of an instance fails; empty if it passes.

        Raises:
            RunOverdue: it passes after its time limit.
        """
        with instance.turn or nullcontext():
            try:
                return instance.check()
            except RunOverdue as overdue:
                if not overdue.failure:
                    raise
                return overdue.failure

    def _refuse_if_unhealthy(self) -> None:
        """Refuses the requests that wait, and all that come, if no instance is left."""
        with self._lock:
            if self.is_healthy:
                return
            self._is_open = False
            waiting = self._queue.clear()
        for request in waiting:
            self._responder.fail(request, self._unhealthy_error(), "REJECTED")
        self.on_health_change()

    def _recover(self, instance: Instance) -> None:
        """Takes an instance back whose backend has returned after its time limit, or has passed its check again."""
        with self._lock:
            was_healthy = self.is_healthy
            what = "hung has finished its batch" if instance.is_hung else "was broken passes its check"
            instance.is_hung, instance.failure = False, ""
            self._is_open = not self._is_closing
        then = "and is freed" if self._is_closing else "and serves again"
        logger.warning("model '%s': an instance that %s %s", self._name, what, then)
        if not was_healthy:
            self.on_health_change()
