"""Calls without a thread for each: a second completion queue beside the one that grpcio's server reads.

grpcio's server gives each RPC to a thread, which waits for the message, however long the client takes, and then for the
response: clients that send none would occupy all threads. Here one thread takes the events of all calls from gRPC's
core and hands their messages to the services; for ModelInfer, the thread that computed a response sends it. grpcio
itself works this way in `grpc._cython`, which is not public: docs/decisions/0007 says what it saves, and `attach`
checks that the interface is still the one that this module uses.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
from grpc._cython import cygrpc

from convoy.auth import TokenFile
from serving.frontends.common.change_threads import ChangeThreads
from serving.frontends.common.services import Services
from serving.frontends.common.status import shutting_down
from serving.frontends.common.watches import Watches
from serving.frontends.grpcio.calls import Call, Method, WatchCall
from serving.inference.request import NO_CONTEXT, RequestContext
from serving.models.changes import Caller
from serving.observability.calls import method_of_rpc
from serving.protocol.methods import HEALTH_WATCH, INFER

logger = logging.getLogger(__name__)

NUM_REQUESTED = {INFER: 32}
"""Calls of a method that gRPC's core may deliver before it is asked for more."""
_NUM_REQUESTED = 2
"""Of all other methods."""

_NO_FLAGS = 0


class CompletionQueue:
    """The unary and Watch calls of one server. `attach` creates it.

    Args:
        core: the server of gRPC's core.
        events: the completion queue, registered with `core`.

    Attributes:
        num_open: the number of open calls. Changed by the thread that takes events alone.
        silent: the calls whose messages have not arrived.
        watches: the open Watch calls.
        is_stopping: whether new Watch calls end at once.
    """

    def __init__(
        self, core: Any, events: Any, services: Services, *, tokens: TokenFile | None, access_log: bool
    ) -> None:
        self.tokens = tokens
        self.access_log = access_log
        self.tracing = services.inference.tracing
        self.num_open = 0
        self.silent: set[Call] = set()
        self.watches: set[WatchCall] = set()
        self.is_stopping = False
        self._core = core
        self._events = events
        self._services = services
        self._refusals = refusals = services.inference.refusals
        self._changes = ChangeThreads(services.admin.blocking, refusals)
        self._watches = Watches(services.admin.health, refusals)
        self._num_requested = 0
        self._thread = threading.Thread(target=self._take_events, name="grpcio-calls", daemon=True)

    def start(self) -> None:
        """Starts to take calls. Call it after the server has started."""
        for method in self._methods():
            for _ in range(NUM_REQUESTED.get(method.path, _NUM_REQUESTED)):
                self._request_call(method)
        self._thread.start()

    def stop(self) -> None:
        """Ends the Watch calls. Call it while the server stops."""
        self.is_stopping = True
        for call in list(self.watches):
            call.fail(shutting_down())

    def refuse_silent(self) -> None:
        """Ends the calls whose messages have not arrived."""
        for call in list(self.silent):
            call.fail(shutting_down())

    def join(self, timeout_s: float) -> None:
        """Waits until the last call has ended. Call it while the server stops."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._changes.close()

    def _methods(self) -> Iterator[Method]:
        yield self._method(INFER, Call, self._infer)
        yield self._method(HEALTH_WATCH, WatchCall, partial(WatchCall.watch, watches=self._watches))
        for path, handler in self._services.admin.unary.items():
            yield self._method(path, Call, partial(_respond, handler))
        for path in self._services.admin.blocking:
            yield self._method(path, Call, partial(self._start_change, path))

    def _method(self, path: str, kind: type[Call], handle: Callable[[Any, bytes], None]) -> Method:
        return Method(path, kind, handle, partial(self._refusals.count_error, method=method_of_rpc(path)))

    def _infer(self, call: Call, payload: bytes) -> None:
        is_plain = call.deadline is None and call.principal is None and call.trace is None
        context = NO_CONTEXT if is_plain else RequestContext(call.deadline, call.principal, call.trace)
        call.request = self._services.inference.infer(payload, context, call)

    def _start_change(self, path: str, call: Call, payload: bytes) -> None:
        self._changes.start(call, path, payload, Caller(call.deadline, lambda: call.has_ended))

    def _request_call(self, method: Method) -> None:
        try:
            self._core.request_registered_call(self._events, self._events, method.path, partial(self._begin, method))
        except ValueError:
            return  # the server is stopping
        self._num_requested += 1

    def _begin(self, method: Method, event: Any) -> None:
        """Handles the event of a new call, or of the server's end."""
        self._num_requested -= 1
        if event.success:
            self._request_call(method)
            self.num_open += 1
            method.make_call(self, method, event).receive(event.invocation_metadata)

    def _take_events(self) -> None:
        """Handles events until the server has stopped and all calls have ended. An event's tag is its handler."""
        while self._num_requested or self.num_open:
            event = self._events.poll()
            try:
                event.tag(event)
            except Exception:
                logger.exception("an event of a call could not be handled")
            del event  # else it keeps the call, and memory of gRPC's core, until the next event arrives


def _respond(handler: Callable[[bytes], bytes], call: Call, payload: bytes) -> None:
    call.succeed(handler(payload))


def attach(
    server: grpc.Server, services: Services, *, tokens: TokenFile | None, access_log: bool
) -> CompletionQueue | None:
    """Routes unary and Watch calls to a completion queue, past the server's own handlers, before the server starts.

    Returns:
        None, after a warning in the log, if grpcio's private interface has changed: then the server's handlers run
        all calls.
    """
    try:
        core = server._cy_server
        _ = core.register_completion_queue, core.register_method, core.request_registered_call
        _ = cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS), cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        _ = cygrpc.SendInitialMetadataOperation((), _NO_FLAGS), cygrpc.SendMessageOperation(b"", _NO_FLAGS)
        _ = cygrpc.SendStatusFromServerOperation((), 0, "", _NO_FLAGS)
        events = cygrpc.CompletionQueue()
        core.register_completion_queue(events)
        for path in (INFER, HEALTH_WATCH, *services.admin.unary, *services.admin.blocking):
            core.register_method(path)
    except (AttributeError, TypeError) as error:
        logger.warning(
            "grpcio %s has another private interface (%s): ModelInfer takes several times the CPU",
            grpc.__version__,
            error,
        )
        return None
    return CompletionQueue(core, events, services, tokens=tokens, access_log=access_log)
