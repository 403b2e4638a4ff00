"""Services without models, whose responses a test controls."""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from protos import health_pb2
from serving import errors
from serving.inference.message_memory import MessageMemory
from serving.inference.request import RequestContext, RequestHandle, ResponseSink
from serving.models.changes import Caller
from serving.observability.health import Health
from serving.observability.refusals import Refusals
from serving.protocol.methods import HEALTH_CHECK, INFERENCE_SERVICE

ERRORS: dict[bytes, errors.ServingError] = {
    b"Cancelled": errors.Cancelled("cancelled"),
    b"InvalidArgument": errors.InvalidArgument("expected [1,28,28], got [1,27,28]"),
    b"DeadlineExceeded": errors.DeadlineExceeded("too late"),
    b"NotFound": errors.NotFound("unknown model 'größe'"),
    b"ResourceExhausted": errors.ResourceExhausted("the queue is full", retry_after_ms=25),
    b"Unsupported": errors.Unsupported("not here"),
    b"Internal": errors.Internal("the model failed"),
    b"Unavailable": errors.Unavailable("not now"),
    b"long": errors.NotFound("ü" * 100_000),
}
"""The error for a payload of that name."""


class HeldRequest:
    """An inference that the test completes; a `RequestHandle`."""

    def __init__(self, payload: bytes, context: RequestContext, sink: ResponseSink[bytes]) -> None:
        self.payload = payload
        self.sink = sink
        self.deadline = context.deadline
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()


class FakeInference:
    """In place of `InferenceService`.

    Responds with the payload in capitals, or with an error by its name; payloads that begin with `hold` wait.

    Attributes:
        held: the inferences that wait.
        refusals: calls that were refused before they came here.
    """

    def __init__(self) -> None:
        self.held: queue.Queue[HeldRequest] = queue.Queue()
        self.refusals = Refusals()
        self.message_memory = MessageMemory()
        self.tracing = None

    def infer(self, payload: bytes, context: RequestContext, sink: ResponseSink[bytes]) -> RequestHandle | None:
        if payload.startswith(b"hold"):
            held = HeldRequest(payload, context, sink)
            self.held.put(held)
            return held
        if payload in ERRORS:
            sink.fail(ERRORS[payload])
        else:
            sink.succeed(payload.upper())
        return None


class FakeAdmin:
    """In place of `AdminService`.

    RPCs respond with their payload, or with an error by its name; `crash` raises an error that no one expects.

    Attributes:
        gate: RepositoryModelLoad waits for it.
        callers: of RepositoryModelLoad.
        loaded: the payloads of the calls that have loaded.
    """

    def __init__(self) -> None:
        self.health = Health()
        self.gate = threading.Event()
        self.callers: queue.Queue[Caller] = queue.Queue()
        self.loaded: list[bytes] = []
        self.unary: Mapping[str, Callable[[bytes], bytes]] = {
            f"/{INFERENCE_SERVICE}/ServerLive": self._echo,
            HEALTH_CHECK: self._check,
        }
        self.blocking: Mapping[str, Callable[[bytes, Caller], bytes]] = {
            f"/{INFERENCE_SERVICE}/RepositoryModelLoad": self._load
        }

    def _echo(self, payload: bytes) -> bytes:
        if payload in ERRORS:
            raise ERRORS[payload]
        if payload == b"crash":
            raise ZeroDivisionError("no one expects this")
        return payload

    def _load(self, payload: bytes, caller: Caller) -> bytes:
        self.callers.put(caller)
        self.gate.wait()
        caller.check("mnist")
        self.loaded.append(payload)
        return payload

    def _check(self, payload: bytes) -> bytes:
        service = health_pb2.HealthCheckRequest.FromString(payload).service
        state = self.health.check(service)
        response: bytes = health_pb2.HealthCheckResponse(status=state).SerializeToString()  # type: ignore[arg-type]
        return response


@dataclass(frozen=True)
class FakeServices:
    """In place of `Services`."""

    inference: FakeInference = field(default_factory=FakeInference)
    admin: FakeAdmin = field(default_factory=FakeAdmin)
