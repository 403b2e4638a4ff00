"""The RPCs by their paths, as grpcio's public API has them: a thread for each RPC, bytes in, bytes out."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping

import grpc

from convoy.auth import Token
from serving.errors import Cancelled, Internal, ResourceExhausted, ServingError, Unauthenticated, Unsupported, quote
from serving.frontends.grpcio.infer_stream import InferStream
from serving.frontends.grpcio.rpc import abort, check_token, deadline_after, logged, when_over
from serving.frontends.grpcio.streams import OpenStreams, reflect, stream_infer, watch
from serving.inference.service import HEALTH_WATCH, INFER, STREAM_INFER, Service
from serving.observability.logging import AccessLog

logger = logging.getLogger(__name__)

Answer = Callable[[bytes], bytes]

MAX_BLOCKING = 16
"""Slow RPCs (loading and unloading models) at a time."""

REFLECTION = tuple(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha"))
"""The two versions differ in their names alone."""


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """Finds the handler of an RPC, behind the check of the token and in front of the access log."""

    def __init__(
        self, service: Service, streams: OpenStreams, *, token: Token | None, access_log: AccessLog | None
    ) -> None:
        self._token = token
        self._access_log = access_log
        self._handlers = _make_handlers(service, streams)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Called by grpcio for each RPC, on the thread that takes them all."""
        path = details.method
        try:
            check_token(self._token, path, details.invocation_metadata)
            handler = self._handlers.get(path) or _refusal(
                Unsupported(f"unknown RPC {quote(path)}; reflection lists what this server knows")
            )
        except Unauthenticated as error:
            handler = _refusal(error)
        return handler if self._access_log is None else logged(handler, path, self._access_log)


def _make_handlers(service: Service, streams: OpenStreams) -> Mapping[str, grpc.RpcMethodHandler]:
    slots = threading.BoundedSemaphore(MAX_BLOCKING)
    handlers = {
        path: _unary(path, _limited(answer, slots) if path in service.blocking else answer)
        for path, answer in service.unary.items()
    }
    handlers[INFER] = _infer(service)
    handlers[STREAM_INFER] = stream_infer(service, streams)
    handlers[HEALTH_WATCH] = watch(service.health, streams)
    return handlers | dict.fromkeys(REFLECTION, reflect(streams))


def _unary(path: str, answer: Answer) -> grpc.RpcMethodHandler:
    def handle(payload: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return answer(payload)
        except ServingError as error:
            abort(context, error)
        except Exception:
            logger.exception("%s could not be answered", path)
            abort(context, Internal("the server failed; its log says why"))

    return grpc.unary_unary_rpc_method_handler(handle)


def _limited(answer: Answer, slots: threading.BoundedSemaphore) -> Answer:
    def handle(payload: bytes) -> bytes:
        if not slots.acquire(blocking=False):
            raise ResourceExhausted(f"{MAX_BLOCKING} models are being loaded or unloaded already")
        try:
            return answer(payload)
        finally:
            slots.release()

    return handle


def _infer(service: Service) -> grpc.RpcMethodHandler:
    """ModelInfer by a thread that waits: what is used where `lane` cannot be."""

    def handle(payload: bytes, context: grpc.ServicerContext) -> bytes:
        stream = InferStream(service, deadline_after(context.time_remaining()))
        when_over(context, stream.cancel)
        stream.read([payload])
        [answer] = list(stream.answers()) or [Cancelled("the caller has gone")]
        if isinstance(answer, ServingError):
            abort(context, answer)
        return answer

    return grpc.unary_unary_rpc_method_handler(handle)


def _refusal(error: ServingError) -> grpc.RpcMethodHandler:
    """Answers an RPC of any kind with an error, before its first message is read."""

    def handle(requests: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)
