"""gRPC on pygrpc-native: HTTP/2 in Rust, outside the GIL. Calls arrive in batches and are answered by number.

One thread receives the calls: it queues inferences and answers quick RPCs itself; another thread loads and unloads
models. Any thread may send a response. pygrpc-native has no bidirectional streams: it forwards ModelStreamInfer and
reflection to a grpcio server on a private Unix socket.

pygrpc-native 0.5.0 ends calls at their deadline and reports them as cancelled. It has four gaps:

- No limit on a message's size: a message that is too large is refused only once it is in memory.
- No limit of connections, and no way to hand it a listening socket or accepted ones: it takes all files that the
  process may open. The HTTP ports keep some for themselves (`convoy.open_files.Reserve`).
- No TLS.
- No metadata whose names begin with `grpc-`: the retry hint is sent as `retry-pushback-ms`, which our client follows
  and gRPC's own retries do not.

Where one of these matters, use `serving.frontends.grpcio`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from pygrpc_native import EVENT_CALL, STREAM_FULL, NativeGrpcFront

from convoy.auth import Principal, TokenFile
from convoy.grpc_core import as_details
from serving.errors import ResourceExhausted, ServingError, StartupError
from serving.frontends.common import limits
from serving.frontends.common.address import UNIX, check_address, private_address, raise_backlog, socket_path
from serving.frontends.common.auth import check_method, check_quota, check_token
from serving.frontends.common.change_threads import ChangeThreads
from serving.frontends.common.services import Services
from serving.frontends.common.status import code_without_response, log_failure, shutting_down
from serving.frontends.common.watches import Watches
from serving.frontends.grpcio import GrpcioFrontend
from serving.inference.request import NO_CONTEXT, RequestContext, RequestHandle
from serving.models.changes import Caller
from serving.observability.calls import method_of_rpc
from serving.observability.logging import AccessLogEntry
from serving.protocol.admin import health_response
from serving.protocol.methods import HEALTH_WATCH, INFER
from serving.protocol.status import OK, grpc_code, trailing_metadata

logger = logging.getLogger(__name__)

INFER_INDEX = 0
"""Of ModelInfer in the table of methods."""
MAX_EVENTS = 256
NUM_IO_THREADS = 1
"""Rust threads for HTTP/2. One of them carries more requests than Python can handle."""
LINGER_S = 0.25
"""Pause between the last response and the end of the connections, which drops what has not been sent yet."""

_POLL_S = 0.01

Metadata = Sequence[tuple[str, str | bytes]]
CallDetails = tuple[Metadata, str, float | None]
"""A call's metadata, its client's address, and the seconds until its deadline (None for none)."""

_NO_DETAILS: CallDetails = ((), "", None)


class NativeFrontend:
    """A `Frontend` on pygrpc-native.

    Args:
        address: `host:port` or `unix:/path`.
        max_message_bytes: size of the largest request that is accepted.
        tokens: of which clients must send one; None for no authentication.
        access_log: whether the access log gets an entry when a call ends.
        reuse_port: whether other processes listen on the port too; the kernel spreads connections over them.
    """

    def __init__(
        self,
        services: Services,
        *,
        address: str,
        max_message_bytes: int,
        tokens: TokenFile | None = None,
        access_log: bool = False,
        reuse_port: bool = False,
    ) -> None:
        self.port = 0
        self._reuse_port = reuse_port
        self._services = services
        self._address = address
        self._max_message_bytes = max_message_bytes
        self._tokens = tokens
        self._access_log = access_log
        unary = (INFER, *services.admin.unary, *services.admin.blocking)
        self._methods = [(path, False) for path in unary] + [(HEALTH_WATCH, True)]
        self._paths = [path for path, _ in self._methods]
        self._calls: dict[int, _NativeCall] = {}
        self._watches = Watches(services.admin.health, services.inference.refusals)
        self._end_of_watch: dict[_NativeCall, Callable[[], None]] = {}
        self._is_stopping = False
        self._changes = ChangeThreads(services.admin.blocking, services.inference.refusals)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts to listen.

        Raises:
            StartupError: the address is not available.
        """
        if not self._reuse_port:
            check_address(self._address)
        private = private_address(self._address)
        self._streams = GrpcioFrontend(
            self._services,
            address=private,
            max_message_bytes=self._max_message_bytes,
            tokens=self._tokens,
            tls=None,
            access_log=self._access_log,
        )
        self._streams.start()
        try:
            self._front = NativeGrpcFront(
                self._address,
                self._methods,
                io_threads=NUM_IO_THREADS,
                call_details=True,
                keepalive_time_ms=1000 * limits.KEEPALIVE_S,
                keepalive_timeout_ms=1000 * limits.KEEPALIVE_TIMEOUT_S,
                reuse_port=self._reuse_port,
            )
        except (OSError, ValueError, RuntimeError) as error:
            self._streams.stop(0)
            raise StartupError(f"cannot listen on {self._address}: {error}") from error
        is_path = self._address.startswith(UNIX)
        raise_backlog(socket_path(self._address) if is_path else self._front.bound_port)
        self._front.set_fallback(socket_path(private))
        self._front.start()
        self.port = 0 if is_path else self._front.bound_port
        self._thread = threading.Thread(target=self._receive, name="native", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Refuses new calls, finishes those in flight within `grace_s`, then closes all connections."""
        if self._thread is None:
            return  # it never started
        self._is_stopping = True
        until = time.monotonic() + grace_s
        for call in list(self._end_of_watch):
            self._end_watch(call, shutting_down())
        self._streams.stop(grace_s)
        while self._calls and time.monotonic() < until:
            time.sleep(_POLL_S)
        for call in list(self._calls.values()):
            call.fail(shutting_down())
            call.cancel_request()
        time.sleep(min(LINGER_S, grace_s))
        self._front.close()
        self._thread.join()
        self._changes.close()

    def _receive(self) -> None:
        """Handles events until pygrpc-native is closed."""
        limit = self._max_message_bytes
        if self._tokens is None and not self._access_log and self._services.inference.tracing is None:
            while (events := self._front.recv_batch(MAX_EVENTS)) is not None:
                for kind, call_id, method, payload, peer in events:
                    # The most frequent kind of event takes the shortest path.
                    if (
                        kind == EVENT_CALL
                        and method == INFER_INDEX
                        and payload is not None
                        and len(payload) <= limit
                        and not self._is_stopping
                    ):
                        self._infer(_NativeCall(self._front, self._calls, call_id), payload, NO_CONTEXT)
                    else:
                        self._handle_event(kind, call_id, method, payload or b"", ((), str(peer), None))
                events = payload = None  # else their messages stay in memory until the next ones arrive
            return
        while (detailed := self._front.recv_batch_details(MAX_EVENTS)) is not None:
            for kind, call_id, method, payload, _, details in detailed:
                self._handle_event(kind, call_id, method, payload or b"", details or _NO_DETAILS)
            detailed = payload = None

    def _infer(self, call: "_NativeCall", payload: bytes, context: RequestContext) -> None:
        try:
            call.request = self._services.inference.infer(payload, context, call)
        except Exception:  # a defect must not end the thread that receives all calls
            call.fail(log_failure(INFER))

    def _handle_event(self, kind: int, call_id: int, method: int, payload: bytes, details: CallDetails) -> None:
        """Handles a new call, or the end of one whose client has disconnected or whose deadline has passed."""
        if kind != EVENT_CALL:
            ended = self._calls.get(call_id)
            if ended is not None:
                self._end_watch(ended)
                ended.end()
            return
        path = self._paths[method]
        call = self._begin(call_id, path, details)
        try:
            self._dispatch(call, path, payload, details)
        except ServingError as error:
            call.fail(error)
        except Exception:
            call.fail(log_failure(path))

    def _begin(self, call_id: int, path: str, details: CallDetails) -> "_NativeCall":
        if not self._access_log:
            return _NativeCall(self._front, self._calls, call_id)
        _, peer, remaining_s = details
        deadline = None if remaining_s is None else time.monotonic() + remaining_s
        return _LoggedCall(self._front, self._calls, call_id, AccessLogEntry(path, peer), deadline)

    def _admit(self, call: "_NativeCall", path: str, payload: bytes, metadata: Metadata) -> Principal | None:
        """Makes all checks of a call. Returns its caller; None if it needs no token."""
        principal = check_token(self._tokens, path, metadata)
        call.set_principal(principal)
        check_method(principal, path)
        if len(payload) > self._max_message_bytes:
            # The wording of gRPC's core, by which clients recognise that a retry is pointless.
            raise ResourceExhausted(f"Received message larger than max ({len(payload)} vs. {self._max_message_bytes})")
        if self._is_stopping:
            raise shutting_down()
        check_quota(principal, len(payload))
        return principal

    def _dispatch(self, call: "_NativeCall", path: str, payload: bytes, details: CallDetails) -> None:
        metadata, peer, remaining_s = details
        try:
            principal = self._admit(call, path, payload, metadata)
        except ServingError as error:  # no service has seen the call
            self._services.inference.refusals.count_error(error, method=method_of_rpc(path))
            raise
        if path == INFER:
            tracing = self._services.inference.tracing
            trace = None if tracing is None else tracing.begin_call(metadata)
            self._infer(call, payload, RequestContext(principal=principal, trace=trace))
        elif path == HEALTH_WATCH:
            self._watch(call, payload, peer)
        elif path in self._services.admin.blocking:
            deadline = None if remaining_s is None else time.monotonic() + remaining_s
            self._changes.start(call, path, payload, Caller(deadline, lambda: call.call_id not in self._calls))
        else:
            call.succeed(self._services.admin.unary[path](payload))

    def _watch(self, call: "_NativeCall", payload: bytes, peer: str) -> None:
        def send(state: int) -> None:
            message = health_response(state).SerializeToString()
            if self._front.stream_try_send(call.call_id, message) == STREAM_FULL:
                self._end_watch(call, ResourceExhausted("the client does not read the health updates"))

        self._end_of_watch[call] = self._watches.open(payload, peer, send)
        if self._is_stopping:  # the stop has begun since the check in `_dispatch`
            self._end_watch(call, shutting_down())

    def _end_watch(self, call: "_NativeCall", error: ServingError | None = None) -> None:
        """Ends a health subscription, if the call is one; with an error if its client is still connected."""
        end = self._end_of_watch.pop(call, None)
        if end is not None:
            end()
            if error is not None:
                call.fail(error)


class _NativeCall:
    """One call; a `ResponseSink`. pygrpc-native ignores responses to calls that have ended.

    Args:
        calls: all open calls by number. A call adds itself, and removes itself when it ends.
    """

    __slots__ = ("_calls", "_front", "call_id", "request")

    def __init__(self, front: NativeGrpcFront, calls: "dict[int, _NativeCall]", call_id: int) -> None:
        self._front = front
        self._calls = calls
        self.call_id = call_id
        self.request: RequestHandle | None = None
        calls[call_id] = self

    def set_principal(self, principal: Principal | None) -> None:
        """Sets the caller, for the access log."""

    def succeed(self, payload: bytes) -> None:
        self._calls.pop(self.call_id, None)
        self._front.respond(self.call_id, payload)

    def fail(self, error: ServingError) -> None:
        self._calls.pop(self.call_id, None)
        trailers = [(key.removeprefix("grpc-"), value) for key, value in trailing_metadata(error)]
        self._front.fail(self.call_id, grpc_code(error), as_details(str(error)), trailers)

    def end(self) -> None:
        """Handles a call that ended without a response: its client has disconnected, or its deadline has passed."""
        self._calls.pop(self.call_id, None)
        self.cancel_request()

    def cancel_request(self) -> None:
        request, self.request = self.request, None  # it refers to this call: the cycle would keep both in memory
        if request is not None:
            request.cancel()


class _LoggedCall(_NativeCall):
    """A call with an access log entry, written by the thread that removes it from the open calls.

    Args:
        entry: is written when the call ends.
        deadline: on the clock of `time.monotonic`; None for none.
    """

    __slots__ = ("_deadline", "_entry")

    def __init__(
        self,
        front: NativeGrpcFront,
        calls: "dict[int, _NativeCall]",
        call_id: int,
        entry: AccessLogEntry,
        deadline: float | None,
    ) -> None:
        super().__init__(front, calls, call_id)
        self._entry = entry
        self._deadline = deadline

    def set_principal(self, principal: Principal | None) -> None:
        self._entry.principal = principal

    def succeed(self, payload: bytes) -> None:
        is_open = self._calls.pop(self.call_id, None)
        super().succeed(payload)
        if is_open:
            self._entry.end(OK)

    def fail(self, error: ServingError) -> None:
        is_open = self._calls.pop(self.call_id, None)
        super().fail(error)
        if is_open:
            self._entry.end(grpc_code(error))

    def end(self) -> None:
        is_open = self._calls.pop(self.call_id, None)
        super().end()
        if is_open:
            self._entry.end(code_without_response(self._deadline))
