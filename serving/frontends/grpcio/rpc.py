"""What one RPC needs of grpcio, whichever way it goes: who may call, until when, how it fails, what is logged of it."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import grpc

from convoy.auth import Token
from serving.errors import ServingError, Unauthenticated
from serving.inference.service import HEALTH_CHECK, HEALTH_WATCH
from serving.observability.logging import AccessLog
from serving.protocol.status import OK, grpc_code, trailing_metadata

OPEN_TO_ALL = (HEALTH_CHECK, HEALTH_WATCH)
"""RPCs that need no token."""

_CANCELLED = 1
_DEADLINE_EXCEEDED = 4
_NO_DEADLINE_S = 1e9
_MAX_DETAIL_BYTES = 2000
"""Of an error's text: it travels in a header, percent-encoded, and clients take 8 KiB of headers by default."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def check_token(token: Token | None, path: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Make sure that a caller with this metadata may call this RPC.

    Raises:
        Unauthenticated: it may not.
    """
    if token is None or path in OPEN_TO_ALL:
        return
    shown = next((value for key, value in metadata if key == "authorization"), None)
    if not isinstance(shown, str) or not token.accepts(shown):
        raise Unauthenticated("expected metadata 'authorization: Bearer TOKEN' with this server's token")


def deadline_after(remaining_s: float) -> float | None:
    """The moment on the clock of `time.monotonic`; None if the caller has set no deadline."""
    return time.monotonic() + remaining_s if remaining_s < _NO_DEADLINE_S else None


def detail(error: ServingError) -> str:
    """The error's text, cut to what fits in a header."""
    return str(error).encode("utf-8", "replace")[:_MAX_DETAIL_BYTES].decode("utf-8", "ignore")


def abort(context: grpc.ServicerContext, error: ServingError) -> NoReturn:
    """End the RPC with an error; leaves by an exception that grpcio knows."""
    context.set_trailing_metadata(trailing_metadata(error))
    context.abort(_CODES[grpc_code(error)], detail(error))
    raise AssertionError("abort raises")


def when_over(context: grpc.ServicerContext, callback: Callable[[], None]) -> None:
    """ResponseSink this when the RPC is over, however it ends."""
    if not context.add_callback(callback):
        callback()


def unanswered_code(deadline: float | None) -> int:
    """The status of an RPC that has ended without an answer of ours."""
    return _DEADLINE_EXCEEDED if deadline is not None and time.monotonic() >= deadline else _CANCELLED


def logged(handler: grpc.RpcMethodHandler, path: str, log: AccessLog) -> grpc.RpcMethodHandler:
    """The same handler, with a line in the access log when the RPC is over."""

    def begin(context: grpc.ServicerContext) -> threading.Event:
        end = log.begin(path, context.peer())
        deadline = deadline_after(context.time_remaining())
        is_answered = threading.Event()

        def note() -> None:
            code = context.code()
            if code is not None:
                end(code.value[0])
            else:
                end(OK if is_answered.is_set() else unanswered_code(deadline))

        when_over(context, note)
        return is_answered

    def once(request: Any, context: grpc.ServicerContext) -> Any:
        is_answered = begin(context)
        answer = handler.unary_unary(request, context)
        is_answered.set()
        return answer

    def stream(request: Any, context: grpc.ServicerContext) -> Any:
        is_answered = begin(context)
        yield from (handler.stream_stream or handler.unary_stream)(request, context)
        is_answered.set()

    if handler.request_streaming:
        make, behaviour = grpc.stream_stream_rpc_method_handler, stream
    elif handler.response_streaming:
        make, behaviour = grpc.unary_stream_rpc_method_handler, stream
    else:
        make, behaviour = grpc.unary_unary_rpc_method_handler, once
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
