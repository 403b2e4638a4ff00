"""Answers the requests of one model version, and records what became of them."""

import logging
import time
from collections.abc import Sequence

from serving.errors import Internal, ServingError
from serving.inference.batch import ComputedBatch, QueuedRequest
from serving.inference.outputs import Outputs
from serving.inference.response_cache import VersionCache
from serving.observability.statistics import Reason, Statistics
from serving.observability.tracing import RequestTrace
from serving.protocol.status import status_name

logger = logging.getLogger(__name__)


class Answers:
    """The answers of one model version. Thread-safe. Whatever a request raises, the others get theirs.

    Args:
        cache: keeps the outputs of batches; None for none.
    """

    def __init__(self, name: str, statistics: Statistics, cache: VersionCache | None) -> None:
        self._name = name
        self._statistics = statistics
        self._cache = cache

    def succeed(self, batch: ComputedBatch) -> int:
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

    def succeed_from_cache(self, request: QueuedRequest, outputs: Outputs) -> None:
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
