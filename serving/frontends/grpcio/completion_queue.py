"""ModelInfer without a thread for each call: a second completion queue beside the one that grpcio's server reads.

grpcio's server gives each RPC to a thread, which waits for the message and then for the batch. Here one thread takes
the events of all calls from gRPC's core and hands their messages to the service; the thread that computed a response
sends it. grpcio itself works this way in `grpc._cython`, which is not public: docs/decisions/0007 says what it saves,
and `attach` checks that the interface is still the one that this module uses.
"""

import logging
import threading
import time
from typing import Any

import grpc
from grpc._cython import cygrpc

from convoy.auth import Principal, TokenFile
from serving.errors import InvalidArgument, ResourceExhausted, ServingError
from serving.frontends.common.auth import check_method, check_quota, check_token
from serving.frontends.common.status import code_without_response, status_details
from serving.frontends.grpcio.rpc import deadline_after
from serving.inference.request import RequestContext, RequestHandle
from serving.inference.service import InferenceService
from serving.observability.logging import AccessLog
from serving.protocol.methods import INFER
from serving.protocol.status import OK, grpc_code, trailing_metadata

logger = logging.getLogger(__name__)

NUM_REQUESTED = 32
"""Calls that gRPC's core may deliver before it is asked for more."""

_NO_FLAGS = 0


class InferCompletionQueue:
    """The ModelInfer calls of one server. `attach` creates it.

    Args:
        core: the server of gRPC's core.
        events: the completion queue, registered with `core`.
    """

    def __init__(
        self,
        core: Any,
        events: Any,
        service: InferenceService,
        *,
        tokens: TokenFile | None,
        access_log: AccessLog | None,
    ) -> None:
        self.service = service
        self.tokens = tokens
        self.access_log = access_log
        self._core = core
        self._events = events
        self._num_requested = 0
        self._num_open = 0
        self._thread = threading.Thread(target=self._take_events, name="grpcio-infer", daemon=True)

    def start(self) -> None:
        """Starts to take calls. Call it after the server has started."""
        for _ in range(NUM_REQUESTED):
            self._request_call()
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits until the last call has ended. Call it while the server stops."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def call_ended(self) -> None:
        """Counts a call that has ended. Runs on the thread that takes events."""
        self._num_open -= 1

    def _request_call(self) -> None:
        try:
            self._core.request_registered_call(self._events, self._events, INFER, None)
        except ValueError:
            return  # the server is stopping
        self._num_requested += 1

    def _take_events(self) -> None:
        """Handles events until the server has stopped and every call has ended.

        An event's tag is the function that handles it; the event of a new call has none.
        """
        while self._num_requested or self._num_open:
            event = self._events.poll()
            try:
                if event.tag is not None:
                    event.tag(event)
                else:
                    self._num_requested -= 1
                    if event.success:
                        self._request_call()
                        self._num_open += 1
                        _InferCall(self, event).receive(event.invocation_metadata)
            except Exception:
                logger.exception("an event of %s could not be handled", INFER)
            del event  # else it keeps the call, and memory of gRPC's core, until the next event arrives


class _InferCall:
    """One ModelInfer call; a `ResponseSink`. Other threads call only `succeed` and `fail`."""

    __slots__ = ("_call", "_code", "_deadline", "_entry", "_has_ended", "_principal", "_queue", "_request")

    def __init__(self, queue: InferCompletionQueue, event: Any) -> None:
        self._queue = queue
        self._call = event.call
        self._deadline = deadline_after(event.call_details.deadline - time.time())
        self._entry = None if queue.access_log is None else queue.access_log.begin(INFER, event.call.peer().decode())
        self._principal: Principal | None = None
        self._request: RequestHandle | None = None
        self._has_ended = False
        self._code: int | None = None

    def receive(self, metadata: tuple[Any, ...]) -> None:
        """Asks gRPC's core for the message, and for an event when the call ends."""
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
        try:
            self._principal = check_token(self._queue.tokens, INFER, metadata)
            if self._entry is not None:
                self._entry.principal = self._principal
            check_method(self._principal, INFER)
        except ServingError as error:
            self._refuse(error)
        else:
            self._call.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message)

    def succeed(self, payload: bytes) -> None:
        self._send((cygrpc.SendMessageOperation(payload, _NO_FLAGS),), OK, "", ())

    def fail(self, error: ServingError) -> None:
        self._send((), grpc_code(error), status_details(error), trailing_metadata(error))

    def _refuse(self, error: ServingError) -> None:
        """Refuses a call that the service does not see."""
        self._queue.service.refusals.count_error(error)
        self.fail(error)

    def _send(self, message: tuple[Any, ...], code: int, details: str, trailers: tuple[tuple[str, str], ...]) -> None:
        if self._has_ended:
            return
        self._code = code
        metadata = cygrpc.SendInitialMetadataOperation((), _NO_FLAGS)
        status = cygrpc.SendStatusFromServerOperation(trailers, code, details, _NO_FLAGS)
        self._call.start_server_batch((metadata, *message, status), _ignore)

    def _on_message(self, event: Any) -> None:
        payload = event.batch_operations[0].message()
        if payload is None:
            # The client sent none, or one over the limit, which the core has refused itself.
            self._refuse(InvalidArgument("ModelInfer expects one message, got none"))
        elif not self._has_ended:
            try:
                check_quota(self._principal, len(payload))
            except ResourceExhausted as error:
                self._refuse(error)
            else:
                self._request = self._queue.service.infer(
                    payload, RequestContext(self._deadline, self._principal), self
                )

    def _on_close(self, event: Any) -> None:
        """Handles the end of the call: by a response, or by cancellation, deadline or a lost connection."""
        self._has_ended = True
        self._queue.call_ended()
        is_cancelled = event.batch_operations[0].cancelled()
        request, self._request = self._request, None  # it refers to this call: the cycle would keep both in memory
        if is_cancelled and request is not None:
            request.cancel()
        if self._entry is not None:
            responded = not is_cancelled and self._code is not None
            self._entry.end(self._code or OK if responded else code_without_response(self._deadline))


def attach(
    server: grpc.Server, service: InferenceService, *, tokens: TokenFile | None, access_log: AccessLog | None
) -> InferCompletionQueue | None:
    """Routes ModelInfer to a completion queue, past the server's own handlers. Call it before the server starts.

    Returns:
        None, after a warning in the log, if grpcio's private interface has changed: then the server's handler runs
        ModelInfer.
    """
    try:
        core = server._cy_server
        _ = core.register_completion_queue, core.register_method, core.request_registered_call
        _ = cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS), cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        _ = cygrpc.SendInitialMetadataOperation((), _NO_FLAGS), cygrpc.SendMessageOperation(b"", _NO_FLAGS)
        _ = cygrpc.SendStatusFromServerOperation((), OK, "", _NO_FLAGS)
        events = cygrpc.CompletionQueue()
        core.register_completion_queue(events)
        core.register_method(INFER)
    except (AttributeError, TypeError) as error:
        logger.warning(
            "grpcio %s has another private interface (%s): ModelInfer takes several times the CPU",
            grpc.__version__,
            error,
        )
        return None
    return InferCompletionQueue(core, events, service, tokens=tokens, access_log=access_log)


def _ignore(event: Any) -> None:
    """Ignores the event of a response that was sent or dropped: `_on_close` handles both."""
