"""One instance of a model: computes batches on one backend, and isolates the requests that fail.

A backend may raise, return or never return anything. Whatever it does, the requests that depend on it get an error, all
others their outputs, and the instance's thread lives on.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from serving.backends import Backend
from serving.errors import Internal
from serving.inference.batch import ComputedBatch, FailedBatch, QueuedRequest, assemble
from serving.inference.outputs import OutputChecker, Outputs
from serving.inference.rate_limiter import Turn
from serving.observability.statistics import BatchTrigger

logger = logging.getLogger(__name__)

MAX_FAILED_BATCHES = 3
"""One after the other, until the instance is checked."""

_CHECK_PAUSES = 100
"""Pause after a check that finds nothing, as a multiple of its duration: clients cannot cause more checks."""
_MIN_CHECK_PAUSE_S, _MAX_CHECK_PAUSE_S = 10.0, 600.0
_MAX_ERROR_CHARACTERS = 400
_PAUSE_OF_TRACEBACKS_S = 5.0
_FRUITLESS_SHARE = 0.1
_FRUITLESS_CREDIT_S = 1.0


class RunOverdue(Exception):
    """The backend returned after its time limit: the requests have been answered with an error.

    Args:
        failure: why the check failed, if the run was one; empty for a check that passed, and for a batch.
    """

    def __init__(self, failure: str = "") -> None:
        super().__init__(failure)
        self.failure = failure


class Attempt:
    """One run of the backend, and the unanswered requests that depend on it.

    The instance answers them when the run ends, and the batcher's watchdog when the run takes too long: whoever claims
    the attempt first.
    """

    __slots__ = ("_claim", "began_ns", "requests")

    def __init__(self, requests: Sequence[QueuedRequest]) -> None:
        self.requests = requests
        self.began_ns = time.monotonic_ns()
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Returns True to the first caller, False to all others."""
        return self._claim.acquire(blocking=False)


class RetryBudget:
    """Time for retries that rescue no request: a tenth of all time, with a second in advance.

    A model that fails on everything thus costs at most a tenth more than without retries, and fails fast. Retries that
    rescue requests are not charged: each of them does useful work.
    """

    def __init__(self) -> None:
        self._left_s = _FRUITLESS_CREDIT_S
        self._updated = time.monotonic()

    def is_spent(self) -> bool:
        now = time.monotonic()
        self._left_s = min(_FRUITLESS_CREDIT_S, self._left_s + _FRUITLESS_SHARE * (now - self._updated))
        self._updated = now
        return self._left_s <= 0

    def spend(self, seconds: float) -> None:
        """May leave a debt, after which `is_spent` is true until it is paid."""
        self._left_s -= seconds


class Instance:
    """One backend and what it computes at the moment. `run_batch` is called by one thread only.

    Args:
        has_batch_dimension: whether the first dimension of all tensors is the batch.
        check: raises an error if the backend's outputs are wrong; None for no check.
        turn: is taken while a batch runs; None if the instance waits for no resources.

    Attributes:
        attempt: the run in progress; None while the backend is idle.
        num_failed: batches of which no request was computed, since the last one that was, or the last check.
        failure: why the last check failed; empty if it passed. Set by the batcher.
        is_hung: the run in progress has exceeded its time limit. Set by the batcher.
    """

    def __init__(
        self,
        model_name: str,
        backend: Backend,
        has_batch_dimension: bool,
        check: Callable[[Backend], object] | None,
        turn: Turn | None,
    ) -> None:
        self.turn = turn
        self.attempt: Attempt | None = None
        self.is_hung = False
        self.num_failed = 0
        self.failure = ""
        self._check = check
        self._next_check = 0.0
        self._model_name = model_name
        self._backend = backend
        self._has_batch_dimension = has_batch_dimension
        self._datatypes = tuple(spec.datatype for spec in backend.inputs)
        self._checker = OutputChecker(backend.outputs)
        self._budget = RetryBudget()
        self._num_failures = 0
        self._next_traceback = 0.0

    def run_batch(
        self, requests: Sequence[QueuedRequest], trigger: BatchTrigger
    ) -> Iterator[ComputedBatch | FailedBatch]:
        """Computes a batch. Yields one result, or several parts with one result each if the batch fails.

        Raises:
            RunOverdue: the watchdog has answered all requests that are in no result.
        """
        result = self._run(requests, requests, trigger)
        if isinstance(result, ComputedBatch):
            self.num_failed = 0
            yield result
            return
        self.num_failed += 1
        if len(requests) == 1 or self._budget.is_spent():
            yield result
        else:
            yield from self._run_parts(requests, trigger)

    def _run_parts(
        self, requests: Sequence[QueuedRequest], trigger: BatchTrigger
    ) -> Iterator[ComputedBatch | FailedBatch]:
        """Computes groups of √n of the n requests, then each request of the groups that fail.

        Computes no row more than twice again; one bad request of 64 takes 16 runs.
        """
        began = time.monotonic()
        has_rescued = False
        size = math.isqrt(len(requests))
        parts = deque(requests[start : start + size] for start in range(0, len(requests), size))
        while parts:
            part = parts.popleft()
            unanswered = [request for left in (part, *parts) for request in left]
            result = self._run(part, unanswered, trigger)
            if isinstance(result, FailedBatch) and len(part) > 1:
                parts.extendleft([request] for request in reversed(part))
                continue
            has_rescued = has_rescued or isinstance(result, ComputedBatch)
            yield result
        if has_rescued:
            self.num_failed = 0
        else:
            self._budget.spend(time.monotonic() - began)

    def _run(
        self, requests: Sequence[QueuedRequest], unanswered: Sequence[QueuedRequest], trigger: BatchTrigger
    ) -> ComputedBatch | FailedBatch:
        attempt = self.attempt = Attempt(unanswered)
        result: ComputedBatch | FailedBatch
        try:
            result = self._compute(requests, trigger, attempt.began_ns)
        except BaseException as error:  # also SystemExit: a backend may raise anything
            self._log_failure(requests, error)
            result = FailedBatch(requests, Internal(f"model '{self._model_name}' failed: {_last_line(error)}"))
        self.attempt = None
        if not attempt.claim():
            raise RunOverdue
        return result

    def _compute(self, requests: Sequence[QueuedRequest], trigger: BatchTrigger, began_ns: int) -> ComputedBatch:
        rows = requests[0].rows if len(requests) == 1 else sum(request.rows for request in requests)
        batch_dimension = rows if self._has_batch_dimension else None
        inputs = assemble(requests, self._datatypes, rows)
        assembled_ns = time.monotonic_ns()
        arrays = self._backend.run(inputs)
        self._checker.check(arrays, batch_dimension)
        times_ns = (began_ns, assembled_ns, time.monotonic_ns())
        return ComputedBatch(requests, rows, Outputs(arrays, batch_dimension), times_ns, trigger)

    def may_check(self) -> bool:
        """Returns whether enough time has passed since the last check: requests that fail must cause few of them."""
        return self._check is not None and time.monotonic() >= self._next_check

    def check(self) -> str:
        """Runs the check. Returns why it fails; empty if it passes.

        One that finds nothing is not repeated soon: the requests may be at fault. An instance that was broken and
        passes may break again, and is checked as soon as its batches fail.

        Raises:
            RunOverdue: the watchdog has given the run up.
        """
        assert self._check is not None
        attempt, began = Attempt(()), time.monotonic()
        self.attempt = attempt
        failure = ""
        try:
            self._check(self._backend)
        except BaseException as error:  # as in `_run`
            failure = _last_line(error)
        self.attempt, self.num_failed = None, 0
        if not (failure or self.failure):
            now = time.monotonic()
            self._next_check = now + min(_MAX_CHECK_PAUSE_S, max(_MIN_CHECK_PAUSE_S, _CHECK_PAUSES * (now - began)))
        if not attempt.claim():
            raise RunOverdue(failure)
        return failure

    def _log_failure(self, requests: Sequence[QueuedRequest], error: BaseException) -> None:
        """Logs a traceback at most every 5 s: clients must not fill the disk with requests that fail."""
        self._num_failures += 1
        now = time.monotonic()
        if now >= self._next_traceback:
            self._next_traceback = now + _PAUSE_OF_TRACEBACKS_S
            logger.error(
                "model '%s' failed on a batch of %d rows (failed runs so far: %d)",
                self._model_name,
                sum(request.rows for request in requests),
                self._num_failures,
                exc_info=error,
            )

    def close(self) -> None:
        """Closes the backend, and gives the turns up."""
        try:
            self._backend.close()
        except Exception:
            logger.exception("model '%s': an instance could not be closed", self._model_name)
        if self.turn is not None:
            self.turn.close()


def _last_line(error: BaseException) -> str:
    """Returns the last line of a backend's error. The lines before are a traceback, which the log has."""
    try:
        text = str(error)
    except Exception:  # an odd error class
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:_MAX_ERROR_CHARACTERS] if lines else type(error).__name__
