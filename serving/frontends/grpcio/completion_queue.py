"""ModelInfer without a thread for each call: a completion queue of its own beside the one that grpcio's server reads.

grpcio's server gives each RPC to a thread, which waits for the message and then for the batch. Here one thread takes
the events of all calls from gRPC's core and hands the messages to the service; whoever has an answer sends it. That is
how grpcio itself works one layer further down, in `grpc._cython`, which is not public: docs/decisions/0007 says what it
is worth, and `attach` finds out whether it is still what we know.
"""

import logging
import threading
import time
from typing import Any

import grpc
from grpc._cython import cygrpc

from convoy.auth import Token
from serving.errors import InvalidArgument, ServingError, Unauthenticated
from serving.frontends.grpcio.rpc import check_token, deadline_after, detail, unanswered_code
from serving.inference.request import RequestHandle
from serving.inference.service import INFER, Service
from serving.observability.logging import AccessLog
from serving.protocol.status import OK, grpc_code, trailing_metadata

logger = logging.getLogger(__name__)

NUM_REQUESTED = 32
"""Calls that the core may hand over before it is asked for more."""

_NO_FLAGS = 0


class InferCompletionQueue:
    """The ModelInfer calls of one server. `attach` makes it."""

    def __init__(
        self, core: Any, events: Any, service: Service, *, token: Token | None, access_log: AccessLog | None
    ) -> None:
        self.service = service
        self.token = token
        self.access_log = access_log
        self._core = core
        self._events = events
        self._num_requested = 0
        self._num_open = 0
        self._thread = threading.Thread(target=self._take_events, name="grpcio-infer", daemon=True)

    def start(self) -> None:
        """Take calls. The server has been started."""
        for _ in range(NUM_REQUESTED):
            self._request_call()
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until the last call is over. The server is stopping."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def forget(self) -> None:
        """A call is over. On the thread that takes events."""
        self._num_open -= 1

    def _request_call(self) -> None:
        try:
            self._core.request_registered_call(self._events, self._events, INFER, None)
        except ValueError:
            return  # the server is stopping
        self._num_requested += 1

    def _take_events(self) -> None:
        """Until the server has stopped and every call is over.

        A tag is what is to be called with the event; new calls have none.
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
                        _GrpcCall(self, event).receive(event.invocation_metadata)
            except Exception:
                logger.exception("an event of ModelInfer could not be handled")
            del event  # it holds the call, and with it memory of the core, until the next one comes


class _GrpcCall:
    """One ModelInfer. Only `succeed` and `fail` are called on other threads."""

    __slots__ = ("_answer_code", "_core", "_deadline", "_end", "_is_over", "_lane", "_pending")

    def __init__(self, lane: InferCompletionQueue, event: Any) -> None:
        self._lane = lane
        self._core = event.call
        self._deadline = deadline_after(event.call_details.deadline - time.time())
        self._end = None if lane.access_log is None else lane.access_log.begin(INFER, event.call.peer().decode())
        self._pending: RequestHandle | None = None
        self._is_over = False
        self._answer_code: int | None = None

    def receive(self, metadata: tuple[Any, ...]) -> None:
        """Ask for the message, and to be told when the call is over."""
        self._core.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
        try:
            check_token(self._lane.token, INFER, metadata)
        except Unauthenticated as error:
            self.fail(error)
        else:
            self._core.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message)

    def succeed(self, payload: bytes) -> None:
        self._send((cygrpc.SendMessageOperation(payload, _NO_FLAGS),), OK, "", ())

    def fail(self, error: ServingError) -> None:
        self._send((), grpc_code(error), detail(error), trailing_metadata(error))

    def _send(self, message: tuple[Any, ...], code: int, details: str, trailers: tuple[tuple[str, str], ...]) -> None:
        if self._is_over:
            return
        self._answer_code = code
        metadata = cygrpc.SendInitialMetadataOperation((), _NO_FLAGS)
        status = cygrpc.SendStatusFromServerOperation(trailers, code, details, _NO_FLAGS)
        self._core.start_server_batch((metadata, *message, status), _ignore)

    def _on_message(self, event: Any) -> None:
        payload = event.batch_operations[0].message()
        if payload is None:
            # None came, or one over the limit, which the core has answered itself.
            self.fail(InvalidArgument("ModelInfer expects one message, got none"))
        elif not self._is_over:
            self._pending = self._lane.service.infer(payload, self, self._deadline)

    def _on_close(self, event: Any) -> None:
        """The call is over: answered, or cancelled by the caller, its deadline or a lost connection."""
        self._is_over = True
        self._lane.forget()
        is_cancelled = event.batch_operations[0].cancelled()
        pending, self._pending = self._pending, None  # a job refers to its call: together they would never be freed
        if is_cancelled and pending is not None:
            pending.cancel()
        if self._end is not None:
            unanswered = is_cancelled or self._answer_code is None
            self._end(unanswered_code(self._deadline) if unanswered else self._answer_code or OK)


def attach(
    server: grpc.Server, service: Service, *, token: Token | None, access_log: AccessLog | None
) -> InferCompletionQueue | None:
    """Take ModelInfer away from the server's own handlers. To be called before the server is started.

    Returns:
        None, with a warning, if grpcio is built otherwise than we know: then the server's handler does the work.
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
        logger.warning("grpcio %s is new to us (%s): ModelInfer takes several times the CPU", grpc.__version__, error)
        return None
    return InferCompletionQueue(core, events, service, token=token, access_log=access_log)


def _ignore(event: Any) -> None:
    """An answer has been sent, or the caller has gone before: `_on_close` hears of both."""
