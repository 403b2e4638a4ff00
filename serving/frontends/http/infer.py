"""The infer endpoint: hands a request to the service, and awaits the response from the thread that computes it."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.errors import DeadlineExceeded, InvalidArgument, ServingError
from serving.frontends.common.status import shutting_down
from serving.frontends.http.auth import PRINCIPAL
from serving.frontends.http.body import read_body
from serving.frontends.http.executor import MAX_INLINE_BYTES, BoundedExecutor
from serving.frontends.http.responses import SUBMITTED, TRACE
from serving.inference.queue_policy import QueuePolicies
from serving.inference.request import RequestContext, RequestHandle
from serving.inference.service import InferenceService
from serving.observability.tracing import Tracing
from serving.protocol.json_infer import MAX_INLINE_BYTES as MAX_INLINE_OUTPUT_BYTES
from serving.protocol.json_infer import JsonRequest, JsonResponse

logger = logging.getLogger(__name__)

WATCH_AFTER_S = 0.01
"""When to begin to watch for a client that disconnects. Most responses come sooner, and a task costs as much as one."""

HEADER_LENGTH = b"inference-header-content-length"

Result = JsonResponse | ServingError


class LoopSink:
    """A `ResponseSink` that hands the result to a function on the event loop."""

    __slots__ = ("_bridge", "_receive")

    def __init__(self, bridge: "LoopBridge", receive: Callable[[Result], Any]) -> None:
        self._bridge = bridge
        self._receive = receive

    def succeed(self, response: JsonResponse, /) -> None:
        self._bridge.pass_on(self._receive, response)

    def fail(self, error: ServingError) -> None:
        self._bridge.pass_on(self._receive, error)


class LoopBridge:
    """Passes results from the batchers' threads to the event loop, and wakes it once for many of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._results: deque[tuple[Callable[[Result], Any], Result]] = deque()
        self._is_scheduled = False

    def pass_on(self, receive: Callable[[Result], Any], result: Result) -> None:
        """Calls a function on the event loop. Safe to call from any thread."""
        self._results.append((receive, result))
        if self._is_scheduled:  # `_deliver` will run: it clears the flag before it empties the queue
            return
        self._is_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: the server has stopped, and nothing waits for results
            self._results.clear()

    def _deliver(self) -> None:
        self._is_scheduled = False
        while self._results:
            receive, result = self._results.popleft()
            try:
                receive(result)
            except Exception:  # a defect must not lose the results of others
                logger.exception("a response could not be sent")


class InferEndpoint:
    """`POST v2/models/M[/versions/V]/infer`. An ASGI application, which saves Starlette's objects for each request."""

    def __init__(
        self, service: InferenceService, bridge: LoopBridge, executor: BoundedExecutor, max_body_bytes: int
    ) -> None:
        self._service = service
        self._bridge = bridge
        self._executor = executor
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        context = begin_request(scope, headers, self._service.tracing)
        body = await read_body(scope, receive, self._max_body_bytes, self._executor)
        path = scope["path_params"]
        model, version = path["model"], path.get("version", "")
        # Fails early: do not parse tensors for an unknown model.
        policies = self._service.repository.get(model, version).spec.policies
        length = header_length(headers.get(HEADER_LENGTH))
        request = JsonRequest(body, length, model, version)
        if (len(body) if length is None else length) > MAX_INLINE_BYTES:
            await self._executor.run(request.parse)
        else:
            request.parse()
        scope[SUBMITTED] = True
        response = await self._infer(request, context, receive, policies)
        scope[SUBMITTED] = False  # what goes wrong from here on is not in the model's statistics
        if response.size_in_json > MAX_INLINE_OUTPUT_BYTES:
            payload, length = await self._executor.run(response.render, self._max_body_bytes)
        else:
            payload, length = response.render(self._max_body_bytes)
        await send({"type": "http.response.start", "status": 200, "headers": response_headers(payload, length)})
        await send({"type": "http.response.body", "body": payload})

    async def _infer(
        self, request: JsonRequest, context: RequestContext, receive: Receive, policies: QueuePolicies | None
    ) -> JsonResponse:
        parameters = request.parse().parameters
        timeout_us = parameters.get("timeout")
        if policies is not None and policies.levels[policies.level(parameters.get("priority"))].interprets_timeout:
            timeout_us = None  # it bounds the time in the queue alone
        response: JsonResponse = await await_response(
            self._bridge, lambda sink: self._service.infer_json(request, context, sink), timeout_us, receive
        )
        return response


def begin_request(scope: Scope, headers: dict[bytes, bytes], tracing: Tracing | None) -> RequestContext:
    """Returns the context of an inference. If it fails, `ErrorHandlers` end its trace."""
    scope[TRACE] = trace = None if tracing is None else tracing.begin_http(headers)
    return RequestContext(principal=scope.get(PRINCIPAL), trace=trace)


async def await_response(
    bridge: LoopBridge, start: Callable[[Any], RequestHandle | None], timeout_us: object, receive: Receive
) -> Any:
    """Starts an inference, and returns its response. Cancels it when its client disconnects or its time is up.

    Args:
        start: hands the request to the service, with a `ResponseSink` of any kind of response.
        timeout_us: the request's parameter `timeout`, in microseconds.

    Raises:
        ServingError: the inference failed.
        ClientDisconnect: the client has disconnected.
    """
    future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    def resolve(result: Result) -> None:
        if not future.done():
            future.set_result(result)

    handle = start(LoopSink(bridge, resolve))
    watch = asyncio.get_running_loop().call_later(WATCH_AFTER_S, _fail_on_disconnect, future, receive)
    try:
        if type(timeout_us) is int and timeout_us > 0:
            async with asyncio.timeout(timeout_us * 1e-6):
                result = await future
        else:
            result = await future
    except (TimeoutError, ClientDisconnect, asyncio.CancelledError) as error:
        if handle is not None:
            handle.cancel()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"no response within the timeout of {timeout_us} microseconds") from None
        if isinstance(error, asyncio.CancelledError):  # by uvicorn, when the grace period is over
            raise shutting_down() from None
        raise
    finally:
        watch.cancel()
    if isinstance(result, ServingError):
        raise result
    return result


def _fail_on_disconnect(future: asyncio.Future[Result], receive: Receive) -> None:
    """Ends the wait for a result when the client disconnects."""

    async def wait_for_disconnect() -> None:
        await receive()  # returns when the client disconnects or the response has been sent
        if not future.done():
            future.set_exception(ClientDisconnect())

    _watches.add(task := asyncio.create_task(wait_for_disconnect()))
    task.add_done_callback(_watches.discard)


_watches: set[asyncio.Task[None]] = set()
"""Asyncio itself keeps no reference to a running task."""


def header_length(text: bytes | None) -> int | None:
    """Returns the bytes of JSON before the tensors, by the value of that header; None without it.

    Raises:
        InvalidArgument: it is no number.
    """
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        got = text[:80].decode("latin-1")
        raise InvalidArgument(f"header Inference-Header-Content-Length must be a whole number of bytes, got '{got}'")
    return int(text)


def response_headers(payload: bytes, json_length: int | None) -> list[tuple[bytes, bytes]]:
    """Returns the headers of a response.

    Args:
        json_length: bytes of JSON before the tensors; None if all of it is JSON.
    """
    length = (b"content-length", b"%d" % len(payload))
    if json_length is None:
        return [(b"content-type", b"application/json"), length]
    return [(b"content-type", b"application/octet-stream"), length, (HEADER_LENGTH, b"%d" % json_length)]
