"""Handlers of RPCs on grpcio's public API: one thread for each RPC, serialised messages in and out.

The completion queue takes unary RPCs and Watch before they come here; their handlers serve where `attach` returns None.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import grpc

from convoy.auth import TokenFile
from serving.errors import Cancelled, PermissionDenied, ServingError, Unauthenticated, Unsupported, quote
from serving.frontends.common import limits
from serving.frontends.common.auth import check_method, check_token
from serving.frontends.common.services import Services
from serving.frontends.common.status import log_failure
from serving.frontends.grpcio.infer_stream import InferStream
from serving.frontends.grpcio.rpc import abort, deadline_after, logged, metered, on_termination
from serving.frontends.grpcio.streams import OpenStreams, reflect, stream_infer, watch
from serving.inference.service import InferenceService
from serving.models.changes import Caller
from serving.observability.calls import UNKNOWN, method_of_rpc
from serving.observability.refusals import Refusals
from serving.protocol.methods import HEALTH_WATCH, INFER, STREAM_INFER

Handler = Callable[[bytes], bytes]

REFLECTION = tuple(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha"))
"""The two versions differ only in their names."""


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """Finds the handler of an RPC, checks its token, and adds the access log."""

    def __init__(self, services: Services, streams: OpenStreams, *, tokens: TokenFile | None, access_log: bool) -> None:
        self._tokens = tokens
        self._access_log = access_log
        self._refusals = services.inference.refusals
        self._handlers = _make_handlers(services, streams, tokens)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Returns the handler of an RPC. grpcio calls it for each RPC, on one thread."""
        path, principal = details.method, None
        method = method_of_rpc(path) if path in self._handlers else UNKNOWN
        count = partial(self._refusals.count_error, method=method)
        try:
            principal = check_token(self._tokens, path, details.invocation_metadata)
            check_method(principal, path)
            if path not in self._handlers:
                raise Unsupported(f"unknown RPC {quote(path)}: use reflection to list the RPCs of this server")
            handler = self._handlers[path]
            if principal is not None and principal.quota is not None and handler.unary_unary is not None:
                handler = metered(handler, principal, count)
        except (Unauthenticated, PermissionDenied, Unsupported) as error:
            count(error)
            handler = _refusal(error)
        return logged(handler, path, principal) if self._access_log else handler


def _make_handlers(
    services: Services, streams: OpenStreams, tokens: TokenFile | None
) -> Mapping[str, grpc.RpcMethodHandler]:
    admin, refusals = services.admin, services.inference.refusals
    free = threading.BoundedSemaphore(limits.MAX_BLOCKING)
    handlers = {path: _unary(path, handler) for path, handler in admin.unary.items()}
    handlers |= {path: _change(path, handler, free, refusals) for path, handler in admin.blocking.items()}
    handlers[INFER] = _infer(services.inference)
    handlers[STREAM_INFER] = stream_infer(services.inference, streams, tokens)
    handlers[HEALTH_WATCH] = watch(admin.health, streams, refusals)
    return handlers | dict.fromkeys(REFLECTION, reflect(streams, refusals))


def _unary(path: str, handler: Handler) -> grpc.RpcMethodHandler:
    return _unary_with_context(path, lambda payload, context: handler(payload))


def _unary_with_context(path: str, handler: Callable[[bytes, grpc.ServicerContext], bytes]) -> grpc.RpcMethodHandler:
    def handle(payload: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return handler(payload, context)
        except ServingError as error:
            abort(context, error)
        except Exception:
            abort(context, log_failure(path))

    return grpc.unary_unary_rpc_method_handler(handle)


def _change(
    path: str, handler: Callable[[bytes, Caller], bytes], free: threading.BoundedSemaphore, refusals: Refusals
) -> grpc.RpcMethodHandler:
    """Returns the handler of an RPC that loads or unloads a model, unless the call has ended before its turn."""

    def handle(payload: bytes, context: grpc.ServicerContext) -> bytes:
        if not free.acquire(blocking=False):
            error = limits.too_many_changes()
            refusals.count_error(error, method=method_of_rpc(path))
            raise error
        try:
            return handler(payload, Caller(deadline_after(context.time_remaining()), lambda: not context.is_active()))
        finally:
            free.release()

    return _unary_with_context(path, handle)


def _infer(service: InferenceService) -> grpc.RpcMethodHandler:
    """Runs ModelInfer on a thread that waits."""

    def handle(payload: bytes, context: grpc.ServicerContext) -> bytes:
        stream = InferStream(service, deadline_after(context.time_remaining()), metadata=context.invocation_metadata())
        on_termination(context, stream.cancel)
        stream.read([payload])
        [response] = [result for _, result in stream.responses()] or [Cancelled("the client has cancelled the call")]
        if isinstance(response, ServingError):
            abort(context, response)
        return response

    return grpc.unary_unary_rpc_method_handler(handle)


def _refusal(error: ServingError) -> grpc.RpcMethodHandler:
    """Refuses an RPC of any kind before its first message is read."""

    def handle(requests: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)
