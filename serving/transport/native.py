"""gRPC over pygrpc-native: HTTP/2 in Rust, outside the GIL; calls come in batches and are answered by number.

One thread takes the calls: it queues inferences and answers what is quick; loading and unloading models goes to a
thread of its own. Answers are sent by whichever thread has them. Bidirectional methods (ModelStreamInfer, reflection)
are not for this front: it forwards them to a grpcio server on a private Unix socket.

The front ends calls at their deadline by itself, and says so as it does of cancelled ones. It has no limit on the size
of a message (0.5.0): one that is too large is refused here, when it is already in memory. It has no TLS either, and no
way to send metadata whose names begin with `grpc-`: the hint when to come again goes out as `retry-pushback-ms`, which
our client follows but gRPC's own retries do not. Where that will not do, use `serving.transport.grpcio`.
"""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from google.protobuf.message import DecodeError
from pygrpc_native import EVENT_CALL, STREAM_FULL, NativeGrpcFront

from protos import health_pb2
from serving.errors import (
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ServingError,
    StartupError,
    Unauthenticated,
    Unavailable,
)
from serving.inference import Pending
from serving.logs import AccessLog
from serving.security import Token
from serving.service import HEALTH_CHECK, HEALTH_WATCH, INFER, Service, health_response
from serving.status import OK, grpc_code, trailing_metadata
from serving.transport.grpcio import GrpcioTransport

logger = logging.getLogger(__name__)

INFER_METHOD = 0
"""Its place in the table of methods."""
MAX_EVENTS = 256
NUM_IO_THREADS = 1
"""Rust threads for HTTP/2. One carries more requests than the Python side can take."""
LINGER_S = 0.25
"""Between the last answer and the end of the connections: the front closes them without sending what it still holds."""

_POLL_S = 0.01

Metadata = Sequence[tuple[str, str | bytes]]


class NativeTransport:
    """A `Transport` on pygrpc-native.

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
        self._calls: dict[int, _Call] = {}
        self._watches: dict[int, Callable[[], None]] = {}
        self._is_stopping = False
        self._blocking = ThreadPoolExecutor(1, thread_name_prefix="native-blocking")
        self._folder: Path | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            StartupError: the address cannot be had.
        """
        try:
            self._front = NativeGrpcFront(self._address, self._methods, io_threads=NUM_IO_THREADS, call_details=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise StartupError(f"cannot listen on {self._address}: {error}") from error
        self._folder = Path(tempfile.mkdtemp(prefix="convoy-"))
        fallback = self._folder / "streams.sock"
        self._streams = GrpcioTransport(
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
        self.port = 0 if self._address.startswith("unix:") else self._front.bound_port
        self._thread = threading.Thread(target=self._receive, name="native", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Refuse what comes, finish what is under way, at most for so long, then close."""
        self._is_stopping = True
        until = time.monotonic() + grace_s
        for call_id in list(self._watches):
            self._end_watch(call_id)
            self._front.stream_end(call_id)
        self._streams.stop(grace_s)
        while self._calls and time.monotonic() < until:
            time.sleep(_POLL_S)
        time.sleep(min(LINGER_S, grace_s))
        self._front.close()
        self._thread.join()
        self._blocking.shutdown(wait=False, cancel_futures=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _receive(self) -> None:
        """Take calls until the front is closed."""
        if self._token is None and self._access_log is None:
            while (events := self._front.recv_batch(MAX_EVENTS)) is not None:
                for kind, call_id, method, payload, _ in events:
                    # The one kind of event that there are thousands of a second has a short way.
                    if kind == EVENT_CALL and method == INFER_METHOD and not self._is_stopping:
                        self._infer(_Call(self._front, self._calls, call_id), payload or b"")
                    else:
                        self._other(kind, call_id, method, payload or b"", _Caller())
            return
        while (detailed := self._front.recv_batch_details(MAX_EVENTS)) is not None:
            for kind, call_id, method, payload, _, details in detailed:
                metadata, peer, _ = details or ((), "", None)
                self._other(kind, call_id, method, payload or b"", _Caller(metadata, peer))

    def _infer(self, call: "_Call", payload: bytes) -> None:
        if len(payload) > self._max_message_bytes:
            call.fail(ResourceExhausted(f"message of {len(payload)} bytes is larger than {self._max_message_bytes}"))
            return
        self._calls[call.call_id] = call
        try:
            call.pending = self._service.infer(payload, call, None)
        except Exception:  # a defect, which must not end the thread that all calls come through
            logger.exception("a call could not be answered")

    def _other(self, kind: int, call_id: int, method: int, payload: bytes, caller: "_Caller") -> None:
        """All events but the plain inference without token and log."""
        if kind != EVENT_CALL:
            call = self._calls.pop(call_id, None)
            if call is not None and call.pending is not None:
                call.pending.cancel()
            self._end_watch(call_id)
            return
        path = self._paths[method]
        log = None if self._access_log is None else self._access_log.begin(path, caller.peer)
        call = _Call(self._front, self._calls, call_id, log)
        try:
            self._dispatch(call, path, payload, caller)
        except ServingError as error:
            call.fail(error)
        except Exception:
            logger.exception("%s could not be answered", path)
            call.fail(Internal("the server failed; its log says why"))

    def _dispatch(self, call: "_Call", path: str, payload: bytes, caller: "_Caller") -> None:
        token = None if path in (HEALTH_CHECK, HEALTH_WATCH) else self._token
        if token is not None and not token.accepts(caller.header("authorization")):
            raise Unauthenticated("expected metadata 'authorization: Bearer TOKEN' with this server's token")
        if self._is_stopping:
            raise Unavailable("the server is shutting down")
        if path == INFER:
            self._infer(call, payload)
        elif path == HEALTH_WATCH:
            self._watch(call.call_id, payload)
        elif path in self._service.blocking:
            self._blocking.submit(self._answer, call, path, payload)
        else:
            self._answer(call, path, payload)

    def _answer(self, call: "_Call", path: str, payload: bytes) -> None:
        self._calls[call.call_id] = call
        try:
            call.succeed(self._service.unary[path](payload))
        except ServingError as error:
            call.fail(error)

    def _watch(self, call_id: int, payload: bytes) -> None:
        try:
            request = health_pb2.HealthCheckRequest.FromString(payload)
        except DecodeError as error:
            raise InvalidArgument(f"the {len(payload)} bytes received are no HealthCheckRequest: {error}") from error

        def tell(status: int) -> None:
            message = health_response(status).SerializeToString()
            if self._front.stream_try_send(call_id, message) == STREAM_FULL:
                error = ResourceExhausted("this watcher does not read what it is told")
                self._front.fail(call_id, grpc_code(error), str(error))
                self._end_watch(call_id)

        self._watches[call_id] = self._service.health.watch(request.service, tell)

    def _end_watch(self, call_id: int) -> None:
        unsubscribe = self._watches.pop(call_id, None)
        if unsubscribe is not None:
            unsubscribe()


class _Caller:
    """What is known of the other side of a call."""

    __slots__ = ("_metadata", "peer")

    def __init__(self, metadata: Metadata = (), peer: str = "") -> None:
        self._metadata = metadata
        self.peer = peer

    def header(self, name: str) -> str | None:
        return next((value for key, value in self._metadata if key == name and isinstance(value, str)), None)


class _Call:
    """One call, to be answered once by number. The front lets an answer to a call that is gone fall."""

    __slots__ = ("_calls", "_front", "_log", "call_id", "pending")

    def __init__(
        self,
        front: NativeGrpcFront,
        calls: "dict[int, _Call]",
        call_id: int,
        log: Callable[[int], None] | None = None,
    ) -> None:
        self._front = front
        self._calls = calls
        self._log = log
        self.call_id = call_id
        self.pending: Pending | None = None

    def succeed(self, payload: bytes) -> None:
        self._calls.pop(self.call_id, None)
        self._front.respond(self.call_id, payload)
        if self._log is not None:
            self._log(OK)

    def fail(self, error: ServingError) -> None:
        self._calls.pop(self.call_id, None)
        hints = [(key.removeprefix("grpc-"), value) for key, value in trailing_metadata(error)]
        self._front.fail(self.call_id, grpc_code(error), str(error), hints)
        if self._log is not None:
            self._log(grpc_code(error))
