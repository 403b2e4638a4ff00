"""The RPCs that stay open: ModelStreamInfer, the health service's Watch, and reflection.

On grpcio each of them occupies a thread while it is open, and ModelStreamInfer two; therefore their number is limited,
for each kind by itself, so that those that need no token cannot shut out the others. When the server stops it asks them
to end, because grpcio waits for them; when a token is revoked, those of its callers.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from convoy.auth import TokenFile
from protos.pool import POOL
from serving.errors import ServingError, Unavailable
from serving.frontends.common import limits
from serving.frontends.common.auth import admit, credentials_of, token_revoked
from serving.frontends.common.limits import OpenCalls
from serving.frontends.common.status import shutting_down
from serving.frontends.common.watches import Watches
from serving.frontends.grpcio.infer_stream import InferStream
from serving.frontends.grpcio.rpc import abort, deadline_after, on_termination
from serving.inference.service import InferenceService
from serving.observability.health import Health
from serving.observability.refusals import Refusals
from serving.protocol.admin import health_response
from serving.protocol.grpc_codec import encode_stream_error, encode_stream_response
from serving.protocol.methods import CONTROL_SERVICE, HEALTH_SERVICE, INFERENCE_SERVICE, STREAM_INFER


class OpenStream:
    """An open stream.

    Args:
        end: makes the stream end soon; called from another thread.

    Attributes:
        error: why it ends, if its client has not ended it.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self.error: ServingError = shutting_down()
        self.end = end

    def revoke(self) -> None:
        """Ends the stream because its token is no longer valid."""
        self.error = token_revoked()
        self.end()


class OpenStreams:
    """All open streams. Thread-safe.

    Args:
        tokens: None if the server asks for none.
    """

    def __init__(self, tokens: TokenFile | None) -> None:
        self._tokens = tokens
        self._lock = threading.Lock()
        self._open: set[OpenStream] = set()
        self.is_ending = False

    @contextmanager
    def register(
        self, calls: OpenCalls, peer: str, end: Callable[[], None], credentials: str | None = None
    ) -> Iterator[OpenStream]:
        """Context that counts a stream as open.

        Args:
            calls: counts the streams of its kind.
            peer: its client's address.
            end: makes the stream end soon; called from another thread when the server stops or the token is revoked.
            credentials: with the token of a stream that needs one.

        Raises:
            ResourceExhausted: too many streams of its kind are open.
            Unavailable: the server is shutting down.
        """
        stream = OpenStream(end)
        with self._lock:
            if self.is_ending:
                raise shutting_down()
            calls.open(peer)
            self._open.add(stream)
        try:
            tokens = self._tokens if credentials is not None else None
            with nullcontext() if tokens is None else tokens.watch(credentials, stream.revoke):
                yield stream
        finally:
            with self._lock:
                self._open.discard(stream)
                calls.close(peer)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def end(self) -> None:
        """Asks all streams to end, and refuses new ones."""
        with self._lock:
            self.is_ending = True
            streams = list(self._open)
        for stream in streams:
            stream.end()


def stream_infer(service: InferenceService, streams: OpenStreams, tokens: TokenFile | None) -> grpc.RpcMethodHandler:
    """Returns the handler of ModelStreamInfer.

    Responses keep the order of the requests. As in Triton, an error is a message of the stream, or ends the stream if
    the client sends the metadata `triton_grpc_error: true`.
    """

    calls = OpenCalls("ModelStreamInfer", service.refusals, limits.MAX_STREAMS)

    def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = context.invocation_metadata()
        ends_on_error = ("triton_grpc_error", "true") in list(metadata)
        # For each message: its token may be revoked while the stream is open.
        admit_message = partial(admit, tokens, STREAM_INFER, metadata)
        stream = InferStream(service, deadline_after(context.time_remaining()), admit_message, metadata)
        on_termination(context, stream.cancel)
        try:
            with streams.register(calls, context.peer(), stream.end, credentials_of(metadata)) as open_stream:
                _start(threading.Thread(target=stream.read, args=(requests,), name="infer-stream", daemon=True), calls)
                for request_id, response in stream.responses():
                    if isinstance(response, bytes):
                        yield encode_stream_response(response)
                    elif ends_on_error:
                        raise response
                    else:
                        yield encode_stream_error(response, request_id)
                if not stream.is_complete:
                    raise open_stream.error
        except ServingError as error:
            stream.cancel()
            abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)


def _start(reader: threading.Thread, calls: OpenCalls) -> None:
    """Starts the thread that reads a stream.

    Args:
        calls: counts the stream if it is refused.

    Raises:
        Unavailable: the process has no more threads.
    """
    try:
        reader.start()
    except RuntimeError as error:
        refusal = Unavailable(f"the stream was not started: {error}")
        calls.count_refused(refusal)
        raise refusal from error


def watch(health: Health, streams: OpenStreams, refusals: Refusals) -> grpc.RpcMethodHandler:
    """Returns the handler of Watch: sends a service's state, then each change, until the client or server ends it."""
    watches = Watches(health, refusals)

    def handle(payload: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        states: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        on_termination(context, lambda: states.put(None))
        try:
            name = watches.service(payload)
            with streams.register(watches.open_calls, context.peer(), lambda: states.put(None)):
                unsubscribe = health.watch(name, states.put)
                try:
                    while (state := states.get()) is not None:
                        yield health_response(state).SerializeToString()
                finally:
                    unsubscribe()
                raise shutting_down()
        except ServingError as error:
            abort(context, error)

    return grpc.unary_stream_rpc_method_handler(handle)


def reflect(streams: OpenStreams, refusals: Refusals) -> grpc.RpcMethodHandler:
    """Returns the handler of reflection, which describes messages and RPCs to tools such as grpcurl."""
    servicer = reflection.ReflectionServicer((INFERENCE_SERVICE, HEALTH_SERVICE, CONTROL_SERVICE), pool=POOL)
    calls = OpenCalls("ServerReflectionInfo", refusals, limits.MAX_REFLECTIONS, limits.MAX_REFLECTIONS_PER_HOST)

    def handle(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        credentials = credentials_of(context.invocation_metadata())
        try:
            with streams.register(calls, context.peer(), context.cancel, credentials):
                yield from servicer.ServerReflectionInfo(requests, context)
        except ServingError as error:
            abort(context, error)

    return grpc.stream_stream_rpc_method_handler(
        handle,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
