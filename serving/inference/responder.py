"""Responds to the requests of one model version, and records their outcomes."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from serving.errors import Internal, ServingError
from serving.inference.batch import ComputedBatch, QueuedRequest
from serving.inference.outputs import Outputs
from serving.inference.response_cache import VersionCache
from serving.observability.statistics import Reason, Statistics
from serving.observability.tracing import RequestTrace
from serving.protocol.status import status_name

logger = logging.getLogger(__name__)


class Responder:
    """Responds to the requests of one model version. Thread-safe. Whatever a request raises, the others get responses.

    Args:
        cache: keeps the outputs of batches; None for none.
    """

    def __init__(self, name: str, statistics: Statistics, cache: VersionCache | None) -> None:
        self._name = name
        self._statistics = statistics
        self._cache = cache

    def respond(self, batch: ComputedBatch) -> int:
        """Gives each request of a batch its rows. Returns when, on the clock of `time.monotonic_ns`."""
        arrivals = []
        row = decoding_ns = 0
        if self._cache is not None:
            self._cache.keep(batch)
        for request in batch.requests:
            try:
                request.finish(batch.outputs, row)
                arrivals.append(request.arrived_ns)
                decoding_ns += request.decoding_ns
            except BaseException as error:
                self._fail_response(request, error)
            row += request.rows
        answered_ns = time.monotonic_ns()
        if traced := [(request.trace, request) for request in batch.requests if request.trace is not None]:
            self._trace(batch, traced, answered_ns)
        if arrivals:
            times_ns = (*batch.times_ns, answered_ns)
            self._statistics.record_batch(arrivals, batch.rows, times_ns, batch.trigger, decoding_ns)
        return answered_ns

    def respond_from_cache(self, request: QueuedRequest, outputs: Outputs) -> None:
        """Gives a request outputs that the response cache has found."""
        try:
            request.finish(outputs, 0)
            self._statistics.record_cache_hit(request.arrived_ns, time.monotonic_ns())
        except BaseException as error:
            self._fail_response(request, error)

    def fail(self, request: QueuedRequest, error: ServingError, reason: Reason) -> None:
        """Gives a request an error."""
        self._statistics.record_failure(reason, status_name(error), time.monotonic_ns() - request.arrived_ns)
        try:
            request.fail(error)
        except BaseException:
            logger.exception("model '%s': an error could not be sent", self._name)

    def _fail_response(self, request: QueuedRequest, error: BaseException) -> None:
        """Answers a request whose response could not be built."""
        if not isinstance(error, ServingError):
            logger.error("model '%s': a response could not be built", self._name, exc_info=error)
            error = Internal("the response could not be built; the server's log says why")
        self.fail(request, error, "OTHER")

    def _trace(
        self, batch: ComputedBatch, traced: Sequence[tuple[RequestTrace, QueuedRequest]], answered_ns: int
    ) -> None:
        facts = {"convoy.model": self._name, "convoy.batch.rows": batch.rows, "convoy.batch.closed": batch.trigger}
        try:
            queued = [(trace, request.queued_ns) for trace, request in traced]
            queued[0][0].add_batch(queued, batch.times_ns, facts | {"convoy.batch.requests": len(batch.requests)})
            for trace, request in traced:
                self._statistics.record_exemplar(trace.trace_id, answered_ns - request.arrived_ns)
        except Exception:
            logger.exception("model '%s': a batch could not be traced", self._name)


class ResponseThread:
    """A thread that responds to computed batches, in the order in which they are handed over.

    A GPU would wait while its instance's thread encodes responses. On CPUs, where a second thread would only cost time,
    the instance's thread responds by itself.

    Args:
        respond: responds to the requests of one batch.
        max_waiting: batches that may wait; then `hand_over` blocks.
    """

    def __init__(self, name: str, respond: Callable[[ComputedBatch], None], max_waiting: int) -> None:
        self._respond = respond
        self._batches: queue.Queue[ComputedBatch | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name=f"{name}-responder", daemon=True)
        self._thread.start()

    def hand_over(self, batch: ComputedBatch) -> None:
        """Gives a batch to the thread."""
        self._batches.put(batch)

    def close(self) -> None:
        """Responds to all batches, then ends the thread."""
        self._batches.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch = self._batches.get()
            if batch is None:
                return
            try:
                self._respond(batch)
            except Exception:
                logger.exception("a batch could not be answered")
            del batch  # else its messages stay in memory until the next batch
