"""Calls on the completion queue: unary ones, and the health service's Watch. None of them occupies a thread."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpc._cython import cygrpc

from convoy.auth import Principal
from convoy.grpc_core import as_details
from serving.errors import InvalidArgument, ServingError
from serving.frontends.common.auth import check_method, check_quota, check_token
from serving.frontends.common.status import code_without_response, log_failure, shutting_down
from serving.frontends.common.watches import Watches
from serving.frontends.grpcio.rpc import deadline_after
from serving.inference.request import RequestHandle
from serving.observability.logging import AccessLogEntry
from serving.observability.tracing import RequestTrace
from serving.protocol.admin import health_response
from serving.protocol.methods import INFER
from serving.protocol.status import OK, grpc_code, trailing_metadata

if TYPE_CHECKING:
    from serving.frontends.grpcio.completion_queue import CompletionQueue

_NO_FLAGS = 0

Trailers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Method:
    """A method on the completion queue.

    Args:
        make_call: creates the object of a new call.
        handle: takes a call and its message; answers the call, or sees to it that another thread does.
        on_refusal: is told of errors before `handle`.
    """

    path: str
    make_call: "Callable[[CompletionQueue, Method, Any], Call]"
    handle: "Callable[[Any, bytes], None]"
    on_refusal: Callable[[ServingError], None]


class Call:
    """One unary call; a `ResponseSink`. Other threads call only `succeed` and `fail`.

    Attributes:
        deadline: on the clock of `time.monotonic`; None for none.
        request: is cancelled if the call is.
        trace: of an inference that is traced.
    """

    __slots__ = (
        "_call",
        "_code",
        "_entry",
        "_method",
        "_queue",
        "deadline",
        "has_ended",
        "principal",
        "request",
        "trace",
    )

    def __init__(self, queue: "CompletionQueue", method: Method, event: Any) -> None:
        self._queue = queue
        self._method = method
        self._call = event.call
        self.deadline = deadline_after(event.call_details.deadline - time.time())
        self._entry = AccessLogEntry(method.path, self.peer()) if queue.access_log else None
        self.principal: Principal | None = None
        self.request: RequestHandle | None = None
        self.trace: RequestTrace | None = None
        self.has_ended = False
        self._code: int | None = None

    def peer(self) -> str:
        """Returns the client's address."""
        address: str = self._call.peer().decode()
        return address

    def receive(self, metadata: tuple[Any, ...]) -> None:
        """Asks gRPC's core for the message, and for an event when the call ends."""
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
        if self._queue.tracing is not None and self._method.path == INFER:
            self.trace = self._queue.tracing.begin_call(metadata)
        if self._queue.tokens is None or self._authenticate(metadata):
            self._queue.silent.add(self)
            self._call.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message)

    def _authenticate(self, metadata: tuple[Any, ...]) -> bool:
        """Returns whether the call may go on; refuses it otherwise."""
        try:
            self.principal = check_token(self._queue.tokens, self._method.path, metadata)
            if self._entry is not None:
                self._entry.principal = self.principal
            check_method(self.principal, self._method.path)
        except ServingError as error:
            self._refuse(error)
            return False
        return True

    def succeed(self, payload: bytes) -> None:
        self._send((cygrpc.SendMessageOperation(payload, _NO_FLAGS),), OK, "", ())

    def fail(self, error: ServingError) -> None:
        self._send((), grpc_code(error), as_details(str(error)), trailing_metadata(error))

    def _refuse(self, error: ServingError) -> None:
        self._method.on_refusal(error)
        self.fail(error)

    def _send(self, message: tuple[Any, ...], code: int, details: str, trailers: Trailers) -> None:
        if self.has_ended:
            return
        self._code = code
        metadata = cygrpc.SendInitialMetadataOperation((), _NO_FLAGS)
        status = cygrpc.SendStatusFromServerOperation(trailers, code, details, _NO_FLAGS)
        self._call.start_server_batch((metadata, *message, status), _ignore)

    def _on_message(self, event: Any) -> None:
        self._queue.silent.discard(self)
        payload = event.batch_operations[0].message()
        if payload is None:
            # The client sent none, or one over the limit, which the core has refused itself.
            name = self._method.path.rpartition("/")[2]
            self._refuse(InvalidArgument(f"{name} expects one message, got none"))
        elif not self.has_ended and (self.principal is None or self._has_quota(len(payload))):
            try:
                self._method.handle(self, payload)
            except ServingError as error:
                self.fail(error)
            except Exception:
                self.fail(log_failure(self._method.path))

    def _has_quota(self, num_bytes: int) -> bool:
        """Returns whether the caller may send so many bytes now; refuses the call otherwise."""
        try:
            check_quota(self.principal, num_bytes)
        except ServingError as error:
            self._refuse(error)
            return False
        return True

    def _on_close(self, event: Any) -> None:
        """Handles the end of the call: by a response, or by cancellation, deadline or a lost connection."""
        self.has_ended = True
        self._queue.num_open -= 1
        is_cancelled = event.batch_operations[0].cancelled()
        request, self.request = self.request, None  # it refers to this call: the cycle would keep both in memory
        if is_cancelled and request is not None:
            request.cancel()
        if self._entry is not None:
            responded = not is_cancelled and self._code is not None
            self._entry.end(self._code or OK if responded else code_without_response(self.deadline))


class WatchCall(Call):
    """One Watch call. gRPC's core sends one message at a time; meanwhile a new state replaces the one that waits."""

    __slots__ = ("_error", "_has_metadata", "_is_sending", "_lock", "_message", "_unsubscribe")

    def __init__(self, queue: "CompletionQueue", method: Method, event: Any) -> None:
        super().__init__(queue, method, event)
        self._lock = threading.Lock()
        self._has_metadata = False
        self._is_sending = False
        self._message: bytes | None = None
        self._error: ServingError | None = None
        self._unsubscribe: Callable[[], None] | None = None

    def watch(self, payload: bytes, watches: Watches) -> None:
        """Sends the state of the service that the message names, and each change.

        Raises:
            InvalidArgument: the message is malformed.
            ResourceExhausted: too many calls are open.
        """
        self._unsubscribe = watches.open(payload, self.peer(), self.send)
        self._queue.watches.add(self)
        if self._queue.is_stopping:  # the stop has begun since the call did
            self.fail(shutting_down())

    def send(self, state: int) -> None:
        """Sends a state. Does not block."""
        with self._lock:
            self._message = health_response(state).SerializeToString()
            self._send_next()

    def fail(self, error: ServingError) -> None:
        with self._lock:
            self._error = error
            self._send_next()

    def _send_next(self) -> None:
        """Sends the message that waits, else the error. Call it with the lock."""
        if self.has_ended or self._is_sending or self._code is not None:
            return
        message, self._message = self._message, None
        operations: tuple[Any, ...] = ()
        if message is not None:
            operations = (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        elif self._error is not None:
            self._code = grpc_code(self._error)
            details, trailers = as_details(str(self._error)), trailing_metadata(self._error)
            operations = (cygrpc.SendStatusFromServerOperation(trailers, self._code, details, _NO_FLAGS),)
        if operations:
            if not self._has_metadata:
                operations = (cygrpc.SendInitialMetadataOperation((), _NO_FLAGS), *operations)
                self._has_metadata = True
            self._is_sending = True
            self._call.start_server_batch(operations, self._on_sent)

    def _on_sent(self, event: Any) -> None:
        with self._lock:
            self._is_sending = False
            self._send_next()

    def _on_close(self, event: Any) -> None:
        super()._on_close(event)
        self._queue.watches.discard(self)
        if self._unsubscribe is not None:
            self._unsubscribe()


def _ignore(event: Any) -> None:
    """Ignores the event of a response that was sent or dropped: `_on_close` handles both."""
