"""Helpers for one RPC on grpcio: its deadline, errors, termination and access log entry."""

import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import grpc

from convoy.auth import Principal
from convoy.grpc_core import as_details
from serving.errors import ResourceExhausted, ServingError
from serving.frontends.common.auth import check_quota
from serving.frontends.common.status import code_without_response
from serving.observability.logging import AccessLogEntry
from serving.protocol.status import OK, grpc_code, trailing_metadata

_NO_DEADLINE_S = 1e9
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def deadline_after(remaining_s: float) -> float | None:
    """Returns a deadline on the clock of `time.monotonic`; None if the client has set none."""
    return time.monotonic() + remaining_s if remaining_s < _NO_DEADLINE_S else None


def abort(context: grpc.ServicerContext, error: ServingError) -> NoReturn:
    """Ends the RPC with an error, by an exception that grpcio handles."""
    context.set_trailing_metadata(trailing_metadata(error))
    context.abort(_CODES[grpc_code(error)], as_details(str(error)))
    raise AssertionError("abort raises")


def on_termination(context: grpc.ServicerContext, callback: Callable[[], None]) -> None:
    """Calls the callback when the RPC ends, however it ends; at once if it has ended."""
    if not context.add_callback(callback):
        callback()


def metered(
    handler: grpc.RpcMethodHandler, principal: Principal, on_refusal: Callable[[ServingError], None]
) -> grpc.RpcMethodHandler:
    """Returns the same handler of a unary RPC, which takes each message out of its caller's quotas first.

    Args:
        on_refusal: is told of the error if a quota is used up.
    """

    def unary(payload: bytes, context: grpc.ServicerContext) -> Any:
        try:
            check_quota(principal, len(payload))
        except ResourceExhausted as error:
            on_refusal(error)
            abort(context, error)
        return handler.unary_unary(payload, context)

    return grpc.unary_unary_rpc_method_handler(unary)


def logged(handler: grpc.RpcMethodHandler, path: str, principal: Principal | None) -> grpc.RpcMethodHandler:
    """Returns the same handler, with an entry in the access log when the RPC ends."""

    def begin(context: grpc.ServicerContext) -> threading.Event:
        entry = AccessLogEntry(path, context.peer())
        entry.principal = principal
        deadline = deadline_after(context.time_remaining())
        has_responded = threading.Event()

        def write_entry() -> None:
            code = context.code()
            if code is not None:
                entry.end(code.value[0])
            else:
                entry.end(OK if has_responded.is_set() else code_without_response(deadline))

        on_termination(context, write_entry)
        return has_responded

    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        has_responded = begin(context)
        response = handler.unary_unary(request, context)
        has_responded.set()
        return response

    def stream(request: Any, context: grpc.ServicerContext) -> Any:
        has_responded = begin(context)
        yield from (handler.stream_stream or handler.unary_stream)(request, context)
        has_responded.set()

    if handler.request_streaming:
        make, behavior = grpc.stream_stream_rpc_method_handler, stream
    elif handler.response_streaming:
        make, behavior = grpc.unary_stream_rpc_method_handler, stream
    else:
        make, behavior = grpc.unary_unary_rpc_method_handler, unary
    return make(behavior, handler.request_deserializer, handler.response_serializer)
