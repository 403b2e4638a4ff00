"""The RPCs that stay open: ModelStreamInfer, the health service's Watch, and reflection.

Each holds a thread for as long as it is open, ModelStreamInfer two: that is how grpcio's server works, and why their
number is limited. When the server stops they are asked to end, because grpcio waits for them.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import health_pb2
from protos.pool import POOL
from serving.errors import InvalidArgument, ResourceExhausted, ServingError, Unavailable
from serving.frontends.grpcio.infer_stream import InferStream
from serving.frontends.grpcio.rpc import abort, deadline_after, when_over
from serving.inference.service import HEALTH_NAME, SERVICE_NAME, Service, health_response, stream_error, stream_response
from serving.observability.health import Health


class OpenStreams:
    """The streams that are open; thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._leavers: dict[object, Callable[[], None]] = {}
        self.is_ending = False

    @contextmanager
    def hold(self, leave: Callable[[], None]) -> Iterator[None]:
        """Be one of them.

        Args:
            leave: ends the stream soon; called when the server stops, from another thread.

        Raises:
            ResourceExhausted: there are too many.
            Unavailable: the server is stopping.
        """
        key = object()
        with self._lock:
            if self.is_ending:
                raise shutting_down()
            if len(self._leavers) >= self._limit:
                raise too_many_streams(self._limit)
            self._leavers[key] = leave
        try:
            yield
        finally:
            with self._lock:
                self._leavers.pop(key, None)

    def end(self) -> None:
        """Ask all streams to end, and take no new ones."""
        with self._lock:
            self.is_ending = True
            leavers = list(self._leavers.values())
        for leave in leavers:
            leave()


def too_many_streams(limit: int) -> ResourceExhausted:
    """What a stream is refused with when so many are open."""
    return ResourceExhausted(f"this server serves at most {limit} streams at a time")


def shutting_down() -> Unavailable:
    """What a stream ends with when the server stops."""
    return Unavailable("the server is shutting down")


def stream_infer(service: Service, streams: OpenStreams) -> grpc.RpcMethodHandler:
    """Answers in the order of the requests; an error is a message or, where asked for, the end (as in Triton)."""

    def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        wants_status = ("triton_grpc_error", "true") in list(context.invocation_metadata())
        stream = InferStream(service, deadline_after(context.time_remaining()))
        when_over(context, stream.cancel)
        try:
            with streams.hold(stream.end):
                threading.Thread(target=stream.read, args=(requests,), name="infer-stream", daemon=True).start()
                for answer in stream.answers():
                    if isinstance(answer, bytes):
                        yield stream_response(answer)
                    elif wants_status:
                        raise answer
                    else:
                        yield stream_error(answer)
                if not stream.is_complete:
                    raise shutting_down()
        except ServingError as error:
            stream.cancel()
            abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)


def watch(health: Health, streams: OpenStreams) -> grpc.RpcMethodHandler:
    """The state of a service, now and at each change, until the caller goes or the server stops."""

    def handle(payload: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        states: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        when_over(context, lambda: states.put(None))
        try:
            name = watched_service(payload)
            with streams.hold(lambda: states.put(None)):
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


def watched_service(payload: bytes) -> str:
    """The name in a HealthCheckRequest.

    Raises:
        InvalidArgument: the bytes are no such message.
    """
    try:
        service: str = health_pb2.HealthCheckRequest.FromString(payload).service
    except DecodeError as error:
        raise InvalidArgument(f"the {len(payload)} bytes received are no HealthCheckRequest: {error}") from error
    return service


def reflect(streams: OpenStreams) -> grpc.RpcMethodHandler:
    """What the server's messages and RPCs look like, for tools such as grpcurl."""
    servicer = reflection.ReflectionServicer((SERVICE_NAME, HEALTH_NAME), pool=POOL)

    def handle(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            with streams.hold(context.cancel):
                yield from servicer.ServerReflectionInfo(requests, context)
        except ServingError as error:
            abort(context, error)

    return grpc.stream_stream_rpc_method_handler(
        handle,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
