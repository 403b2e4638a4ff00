"""A service that answers as a test wants it to, in place of one with models."""

import queue
import threading
from collections.abc import Callable, Mapping

from protos import health_pb2
from serving import errors
from serving.inference.request import RequestHandle, ResponseSink
from serving.inference.service import HEALTH_CHECK, SERVICE_NAME
from serving.observability.health import Health

ERRORS: dict[bytes, errors.ServingError] = {
    b"Cancelled": errors.Cancelled("gone"),
    b"InvalidArgument": errors.InvalidArgument("expected [1,28,28], got [1,27,28]"),
    b"DeadlineExceeded": errors.DeadlineExceeded("too late"),
    b"NotFound": errors.NotFound("unknown model 'größe'"),
    b"ResourceExhausted": errors.ResourceExhausted("the queue is full", retry_after_ms=25),
    b"Unsupported": errors.Unsupported("not here"),
    b"Internal": errors.Internal("the model failed"),
    b"Unavailable": errors.Unavailable("not now"),
    b"long": errors.NotFound("ü" * 100_000),
}
"""What a payload of that name is answered with."""


class Held:
    """An inference that waits for the test; a `RequestHandle`."""

    def __init__(self, payload: bytes, call: ResponseSink, deadline: float | None) -> None:
        self.payload = payload
        self.call = call
        self.deadline = deadline
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()


class FakeService:
    """The interface of `serving.inference.service.Service` that transports use.

    ModelInfer answers with its payload in capitals, or with an error by its name, or, for `hold…`, when the test says
    so; unary RPCs answer with their payload, errors as well, and `crash` as nobody expects.

    Attributes:
        held: the inferences that wait.
        gate: what RepositoryModelLoad waits for.
    """

    def __init__(self) -> None:
        self.health = Health()
        self.held: queue.Queue[Held] = queue.Queue()
        self.gate = threading.Event()
        self.unary: Mapping[str, Callable[[bytes], bytes]] = {
            f"/{SERVICE_NAME}/ServerLive": self._echo,
            f"/{SERVICE_NAME}/RepositoryModelLoad": self._load,
            HEALTH_CHECK: self._check,
        }
        self.blocking = frozenset({f"/{SERVICE_NAME}/RepositoryModelLoad"})

    def infer(self, payload: bytes, call: ResponseSink, deadline: float | None) -> RequestHandle | None:
        if payload.startswith(b"hold"):
            held = Held(payload, call, deadline)
            self.held.put(held)
            return held
        if payload in ERRORS:
            call.fail(ERRORS[payload])
        else:
            call.succeed(payload.upper())
        return None

    def _echo(self, payload: bytes) -> bytes:
        if payload in ERRORS:
            raise ERRORS[payload]
        if payload == b"crash":
            raise ZeroDivisionError("nobody expects this")
        return payload

    def _load(self, payload: bytes) -> bytes:
        self.gate.wait()
        return payload

    def _check(self, payload: bytes) -> bytes:
        service = health_pb2.HealthCheckRequest.FromString(payload).service
        state = self.health.check(service)
        answer: bytes = health_pb2.HealthCheckResponse(status=state).SerializeToString()  # type: ignore[arg-type]
        return answer
