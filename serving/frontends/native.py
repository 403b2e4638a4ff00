"""gRPC over pygrpc-native: HTTP/2 in Rust, outside the GIL; calls come in batches and are answered by number.

One thread takes the calls: it queues inferences and answers what is quick; loading and unloading models goes to a
thread of its own. Answers are sent by whichever thread has them. Bidirectional methods (ModelStreamInfer, reflection)
are not for this front: it forwards them to a grpcio server on a private Unix socket.

The front ends calls at their deadline by itself, and says so as it does of cancelled ones. It has no limit on the size
of a message (0.5.0): one that is too large is refused here, when it is already in memory. It has no TLS either, and no
way to send metadata whose names begin with `grpc-`: the hint when to come again goes out as `retry-pushback-ms`, which
our client follows but gRPC's own retries do not. Where that will not do, use `serving.frontends.grpcio`.
"""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pygrpc_native import EVENT_CALL, STREAM_FULL, NativeGrpcFront

from convoy.auth import Token
from serving.errors import Internal, ResourceExhausted, ServingError, StartupError
from serving.frontends.address import UNIX, check_address
from serving.frontends.grpcio import GrpcioFrontend
from serving.frontends.grpcio.frontend import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, MAX_STREAMS
from serving.frontends.grpcio.rpc import check_token, detail, unanswered_code
from serving.frontends.grpcio.streams import shutting_down, too_many_streams, watched_service
from serving.inference.request import RequestHandle
from serving.inference.service import HEALTH_WATCH, INFER, Service, health_response
from serving.observability.logging import AccessLog
from serving.protocol.status import OK, grpc_code, trailing_metadata

logger = logging.getLogger(__name__)

INFER_METHOD = 0
"""Its place in the table of methods."""
MAX_EVENTS = 256
NUM_IO_THREADS = 1
"""Rust threads for HTTP/2. One carries more requests than the Python side can take."""
LINGER_S = 0.25
"""Between the last answer and the end of the connections: the front closes them without sending what it still holds."""

_POLL_S = 0.01

Details = tuple[Sequence[tuple[str, str | bytes]], str, float | None]
"""Of a call: its metadata, who calls, and the seconds until its deadline."""

_UNKNOWN: Details = ((), "", None)


class NativeFrontend:
    """A `Frontend` on pygrpc-native.

    Args:
        address: `host:port` or `unix:/path`.
        token: what callers must show; None for no check.
        access_log: told of each call when it is over.
    """

    def __init__(
        self,
        service: Service,
        *,
        address: str,
        max_message_bytes: int,
        token: Token | None = None,
        access_log: AccessLog | None = None,
    ) -> None:
        self.port = 0
        self._service = service
        self._address = address
        self._max_message_bytes = max_message_bytes
        self._token = token
        self._access_log = access_log
        self._methods = [(path, False) for path in (INFER, *service.unary)] + [(HEALTH_WATCH, True)]
        self._paths = [path for path, _ in self._methods]
        self._calls: dict[int, _GrpcCall] = {}
        self._watches: dict[_GrpcCall, Callable[[], None]] = {}
        self._is_stopping = False
        self._blocking = ThreadPoolExecutor(1, thread_name_prefix="native-blocking")
        self._folder: Path | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            StartupError: the address cannot be had.
        """
        check_address(self._address)
        try:
            self._front = NativeGrpcFront(
                self._address,
                self._methods,
                io_threads=NUM_IO_THREADS,
                call_details=True,
                keepalive_time_ms=1000 * KEEPALIVE_S,
                keepalive_timeout_ms=1000 * KEEPALIVE_TIMEOUT_S,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise StartupError(f"cannot listen on {self._address}: {error}") from error
        self._folder = Path(tempfile.mkdtemp(prefix="convoy-"))
        fallback = self._folder / "streams.sock"
        self._streams = GrpcioFrontend(
            self._service,
            address=f"unix:{fallback}",
            max_message_bytes=self._max_message_bytes,
            token=self._token,
            tls=None,
            access_log=self._access_log,
        )
        self._streams.start()
        self._front.set_fallback(str(fallback))
        self._front.start()
        self.port = 0 if self._address.startswith(UNIX) else self._front.bound_port
        self._thread = threading.Thread(target=self._receive, name="native", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Refuse what comes, finish what is under way, at most for so long, then close."""
        if self._folder is None:
            return  # it never started
        self._is_stopping = True
        until = time.monotonic() + grace_s
        for call in list(self._watches):
            self._end_watch(call, shutting_down())
        self._streams.stop(grace_s)
        while self._calls and time.monotonic() < until:
            time.sleep(_POLL_S)
        for call in list(self._calls.values()):
            call.fail(shutting_down())
            call.drop()
        time.sleep(min(LINGER_S, grace_s))
        self._front.close()
        self._thread.join()
        self._blocking.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _receive(self) -> None:
        """Take calls until the front is closed."""
        limit = self._max_message_bytes
        if self._token is None and self._access_log is None:
            while (events := self._front.recv_batch(MAX_EVENTS)) is not None:
                for kind, call_id, method, payload, _ in events:
                    # The one kind of event that there are thousands of a second has a short way.
                    if (
                        kind == EVENT_CALL
                        and method == INFER_METHOD
                        and payload is not None
                        and len(payload) <= limit
                        and not self._is_stopping
                    ):
                        self._infer(_GrpcCall(self._front, self._calls, call_id), payload)
                    else:
                        self._other(kind, call_id, method, payload or b"", _UNKNOWN)
                events = payload = None  # or their messages would stay until the next ones come
            return
        while (detailed := self._front.recv_batch_details(MAX_EVENTS)) is not None:
            for kind, call_id, method, payload, _, details in detailed:
                self._other(kind, call_id, method, payload or b"", details or _UNKNOWN)
            detailed = payload = None

    def _infer(self, call: "_GrpcCall", payload: bytes) -> None:
        try:
            call.pending = self._service.infer(payload, call, None)
        except Exception:  # a defect, which must not end the thread that all calls come through
            logger.exception("a call could not be answered")

    def _other(self, kind: int, call_id: int, method: int, payload: bytes, details: Details) -> None:
        """All events but the plain inference without token and log."""
        if kind != EVENT_CALL:
            gone = self._calls.get(call_id)
            if gone is not None:
                self._end_watch(gone)
                gone.leave()
            return
        path = self._paths[method]
        call = self._begin(call_id, path, details)
        try:
            self._dispatch(call, path, payload, details)
        except ServingError as error:
            call.fail(error)
        except Exception:
            logger.exception("%s could not be answered", path)
            call.fail(Internal("the server failed; its log says why"))

    def _begin(self, call_id: int, path: str, details: Details) -> "_GrpcCall":
        if self._access_log is None:
            return _GrpcCall(self._front, self._calls, call_id)
        _, peer, remaining_s = details
        deadline = None if remaining_s is None else time.monotonic() + remaining_s
        return _LoggedCall(self._front, self._calls, call_id, self._access_log.begin(path, peer), deadline)

    def _dispatch(self, call: "_GrpcCall", path: str, payload: bytes, details: Details) -> None:
        check_token(self._token, path, details[0])
        if len(payload) > self._max_message_bytes:
            # In the words of gRPC's core, by which clients know that it is of no use to come again.
            raise ResourceExhausted(f"Received message larger than max ({len(payload)} vs. {self._max_message_bytes})")
        if self._is_stopping:
            raise shutting_down()
        if path == INFER:
            self._infer(call, payload)
        elif path == HEALTH_WATCH:
            self._watch(call, payload)
        elif path in self._service.blocking:
            self._blocking.submit(self._answer, call, path, payload)
        else:
            self._answer(call, path, payload)

    def _answer(self, call: "_GrpcCall", path: str, payload: bytes) -> None:
        try:
            call.succeed(self._service.unary[path](payload))
        except ServingError as error:
            call.fail(error)

    def _watch(self, call: "_GrpcCall", payload: bytes) -> None:
        name = watched_service(payload)
        if len(self._watches) >= MAX_STREAMS:
            raise too_many_streams(MAX_STREAMS)

        def tell(status: int) -> None:
            message = health_response(status).SerializeToString()
            if self._front.stream_try_send(call.call_id, message) == STREAM_FULL:
                self._end_watch(call, ResourceExhausted("this watcher does not read what it is told"))

        self._watches[call] = self._service.health.watch(name, tell)
        if self._is_stopping:  # since `_dispatch` looked
            self._end_watch(call, shutting_down())

    def _end_watch(self, call: "_GrpcCall", error: ServingError | None = None) -> None:
        """Forget a watcher, if the call is one; with an error if it is still there."""
        unsubscribe = self._watches.pop(call, None)
        if unsubscribe is not None:
            unsubscribe()
            if error is not None:
                call.fail(error)


class _GrpcCall:
    """One call, to be answered once by number. The front lets an answer to a call that is gone fall.

    Args:
        calls: all that are open; it is one of them until it is over.
    """

    __slots__ = ("_calls", "_front", "call_id", "pending")

    def __init__(self, front: NativeGrpcFront, calls: "dict[int, _GrpcCall]", call_id: int) -> None:
        self._front = front
        self._calls = calls
        self.call_id = call_id
        self.pending: RequestHandle | None = None
        calls[call_id] = self

    def succeed(self, payload: bytes) -> None:
        self._calls.pop(self.call_id, None)
        self._front.respond(self.call_id, payload)

    def fail(self, error: ServingError) -> None:
        self._calls.pop(self.call_id, None)
        hints = [(key.removeprefix("grpc-"), value) for key, value in trailing_metadata(error)]
        self._front.fail(self.call_id, grpc_code(error), detail(error), hints)

    def leave(self) -> None:
        """The caller has gone, or its deadline has passed."""
        self._calls.pop(self.call_id, None)
        self.drop()

    def drop(self) -> None:
        """Nobody waits for the inference any more."""
        pending, self.pending = self.pending, None  # a job refers to its call: together they would never be freed
        if pending is not None:
            pending.cancel()


class _LoggedCall(_GrpcCall):
    """One with a line in the access log, written by whoever takes it from those that are open.

    Args:
        end: writes the line.
        deadline: on the clock of `time.monotonic`; None for none.
    """

    __slots__ = ("_deadline", "_end")

    def __init__(
        self,
        front: NativeGrpcFront,
        calls: "dict[int, _GrpcCall]",
        call_id: int,
        end: Callable[[int], None],
        deadline: float | None,
    ) -> None:
        super().__init__(front, calls, call_id)
        self._end = end
        self._deadline = deadline

    def succeed(self, payload: bytes) -> None:
        is_open = self._calls.pop(self.call_id, None)
        super().succeed(payload)
        if is_open:
            self._end(OK)

    def fail(self, error: ServingError) -> None:
        is_open = self._calls.pop(self.call_id, None)
        super().fail(error)
        if is_open:
            self._end(grpc_code(error))

    def leave(self) -> None:
        is_open = self._calls.pop(self.call_id, None)
        super().leave()
        if is_open:
            self._end(unanswered_code(self._deadline))
