"""Handlers of RPCs on grpcio's public API: one thread for each RPC, serialised messages in and out."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping

import grpc

from convoy.auth import Token
from serving.errors import Cancelled, Internal, ResourceExhausted, ServingError, Unauthenticated, Unsupported, quote
from serving.frontends.common.auth import check_token
from serving.frontends.common.services import Services
from serving.frontends.grpcio.infer_stream import InferStream
from serving.frontends.grpcio.rpc import abort, deadline_after, logged, on_termination
from serving.frontends.grpcio.streams import OpenStreams, reflect, stream_infer, watch
from serving.inference.service import InferenceService
from serving.observability.logging import AccessLog
from serving.protocol.methods import HEALTH_WATCH, INFER, STREAM_INFER

logger = logging.getLogger(__name__)

Handler = Callable[[bytes], bytes]

MAX_BLOCKING = 16
"""Calls that load or unload a model at the same time."""

REFLECTION = tuple(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha"))
"""The two versions differ only in their names."""


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """Finds the handler of an RPC, checks its token, and adds the access log."""

    def __init__(
        self, services: Services, streams: OpenStreams, *, token: Token | None, access_log: AccessLog | None
    ) -> None:
        self._token = token
        self._access_log = access_log
        self._handlers = _make_handlers(services, streams)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Returns the handler of an RPC. grpcio calls it for each RPC, on one thread."""
        path = details.method
        try:
            check_token(self._token, path, details.invocation_metadata)
            handler = self._handlers.get(path) or _refusal(
                Unsupported(f"unknown RPC {quote(path)}: use reflection to list the RPCs of this server")
            )
        except Unauthenticated as error:
            handler = _refusal(error)
        return handler if self._access_log is None else logged(handler, path, self._access_log)


def _make_handlers(services: Services, streams: OpenStreams) -> Mapping[str, grpc.RpcMethodHandler]:
    admin = services.admin
    slots = threading.BoundedSemaphore(MAX_BLOCKING)
    handlers = {
        path: _unary(path, _limited(handler, slots) if path in admin.blocking else handler)
        for path, handler in admin.unary.items()
    }
    handlers[INFER] = _infer(services.inference)
    handlers[STREAM_INFER] = stream_infer(services.inference, streams)
    handlers[HEALTH_WATCH] = watch(admin.health, streams)
    return handlers | dict.fromkeys(REFLECTION, reflect(streams))


def _unary(path: str, handler: Handler) -> grpc.RpcMethodHandler:
    def handle(payload: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return handler(payload)
        except ServingError as error:
            abort(context, error)
        except Exception:
            logger.exception("%s failed", path)
            abort(context, Internal("the server failed; its log says why"))

    return grpc.unary_unary_rpc_method_handler(handle)


def _limited(handler: Handler, slots: threading.BoundedSemaphore) -> Handler:
    def handle(payload: bytes) -> bytes:
        if not slots.acquire(blocking=False):
            raise ResourceExhausted(f"{MAX_BLOCKING} models are being loaded or unloaded already")
        try:
            return handler(payload)
        finally:
            slots.release()

    return handle


def _infer(service: InferenceService) -> grpc.RpcMethodHandler:
    """Runs ModelInfer on a thread that waits. Used only where `completion_queue.attach` returns None."""

    def handle(payload: bytes, context: grpc.ServicerContext) -> bytes:
        stream = InferStream(service, deadline_after(context.time_remaining()))
        on_termination(context, stream.cancel)
        stream.read([payload])
        [response] = list(stream.responses()) or [Cancelled("the client has cancelled the call")]
        if isinstance(response, ServingError):
            abort(context, response)
        return response

    return grpc.unary_unary_rpc_method_handler(handle)


def _refusal(error: ServingError) -> grpc.RpcMethodHandler:
    """Refuses an RPC of any kind before its first message is read."""

    def handle(requests: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)
