"""The infer endpoint: hands a request to the service, and awaits the response from the thread that computes it."""

import asyncio
from collections import deque

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.errors import DeadlineExceeded, InvalidArgument, ServingError
from serving.frontends.common.status import shutting_down
from serving.frontends.http.auth import PRINCIPAL, count_decompressed
from serving.frontends.http.body import read_body
from serving.frontends.http.executor import MAX_INLINE_BYTES, BoundedExecutor
from serving.frontends.http.responses import SUBMITTED
from serving.inference.request import InferRequest, InferResponse, RequestContext
from serving.inference.service import InferenceService
from serving.protocol.json_codec import parse_request
from serving.protocol.json_responses import render_response

MAX_INLINE_OUTPUT_BYTES = 8 << 10
"""Of tensors that the event loop itself renders as JSON, in about a millisecond."""

WATCH_AFTER_S = 0.01
"""When to begin to watch for a client that disconnects. Most responses come sooner, and a task costs as much as one."""

HEADER_LENGTH = b"inference-header-content-length"

_Result = InferResponse | ServingError


class _ResultSink:
    """A `ResponseSink` that resolves a future of the event loop."""

    __slots__ = ("_bridge", "_future")

    def __init__(self, bridge: "LoopBridge", future: asyncio.Future[_Result]) -> None:
        self._bridge = bridge
        self._future = future

    def succeed(self, response: InferResponse, /) -> None:
        self._bridge.set_result(self._future, response)

    def fail(self, error: ServingError) -> None:
        self._bridge.set_result(self._future, error)


class LoopBridge:
    """Passes results from the batchers' threads to the event loop, and wakes it once for many of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._results: deque[tuple[asyncio.Future[_Result], _Result]] = deque()
        self._is_scheduled = False

    def set_result(self, future: asyncio.Future[_Result], result: _Result) -> None:
        """Resolves a future of the event loop. Safe to call from any thread."""
        self._results.append((future, result))
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
            future, result = self._results.popleft()
            if not future.done():
                future.set_result(result)


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
        body = await read_body(headers, receive, self._max_body_bytes, self._executor)
        count_decompressed(scope, body)
        path = scope["path_params"]
        model, version = path["model"], path.get("version", "")
        self._service.repository.get(model, version)  # fails early: do not parse tensors for an unknown model
        length = _header_length(headers)
        if (len(body) if length is None else length) > MAX_INLINE_BYTES:
            request, form = await self._executor.run(parse_request, body, length, model, version)
        else:
            request, form = parse_request(body, length, model, version)
        scope[SUBMITTED] = True
        response = await self._infer(request, RequestContext(principal=scope.get(PRINCIPAL)), receive)
        if form.size_in_json(response) > MAX_INLINE_OUTPUT_BYTES:
            payload, header_length = await self._executor.run(render_response, response, form, self._max_body_bytes)
        else:
            payload, header_length = render_response(response, form, self._max_body_bytes)
        await _send(send, payload, header_length)

    async def _infer(self, request: InferRequest, context: RequestContext, receive: Receive) -> InferResponse:
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        handle = self._service.submit(request, context, _ResultSink(self._bridge, future))
        watch = asyncio.get_running_loop().call_later(WATCH_AFTER_S, _fail_on_disconnect, future, receive)
        timeout_us = request.parameters.get("timeout")
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


def _fail_on_disconnect(future: asyncio.Future[_Result], receive: Receive) -> None:
    """Ends the wait for a result when the client disconnects."""

    async def wait_for_disconnect() -> None:
        await receive()  # returns when the client disconnects or the response has been sent
        if not future.done():
            future.set_exception(ClientDisconnect())

    _watches.add(task := asyncio.create_task(wait_for_disconnect()))
    task.add_done_callback(_watches.discard)


_watches: set[asyncio.Task[None]] = set()
"""Asyncio itself keeps no reference to a running task."""


def _header_length(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        got = text[:80].decode("latin-1")
        raise InvalidArgument(f"header Inference-Header-Content-Length must be a whole number of bytes, got '{got}'")
    return int(text)


async def _send(send: Send, payload: bytes, header_length: int | None) -> None:
    kind = b"application/json" if header_length is None else b"application/octet-stream"
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(payload))]
    if header_length is not None:
        headers.append((HEADER_LENGTH, b"%d" % header_length))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": payload})
