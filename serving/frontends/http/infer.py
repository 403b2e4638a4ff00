"""The infer endpoint: a request goes to the service, its answer comes back from the thread that computed it."""

import asyncio
from collections import deque
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from serving.errors import DeadlineExceeded, InvalidArgument, ServingError, Unavailable
from serving.frontends.http.body import read_body
from serving.inference.request import InferRequest, InferResponse
from serving.inference.service import Service
from serving.protocol.json_codec import parse_request, render_response

HEADER_LENGTH = b"inference-header-content-length"

_Answer = InferResponse | ServingError


class LoopBridge:
    """Answers on their way from the batchers' threads to the event loop, which is woken once for many of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[asyncio.Future[_Answer], _Answer]] = deque()
        self._is_woken = False

    def post(self, future: asyncio.Future[_Answer], answer: _Answer) -> None:
        """Resolve a future of the loop; from any thread."""
        self._posted.append((future, answer))
        if self._is_woken:  # then `_deliver` is still to come, and empties the box after it has cleared this
            return
        self._is_woken = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: the server has stopped, and nobody waits any more
            self._posted.clear()

    def _deliver(self) -> None:
        self._is_woken = False
        while self._posted:
            future, answer = self._posted.popleft()
            if not future.done():
                future.set_result(answer)


class InferEndpoint:
    """`POST v2/models/M[/versions/V]/infer` as an ASGI application, without Starlette's objects a request."""

    def __init__(self, service: Service, mailbox: LoopBridge, max_body_bytes: int) -> None:
        self._service = service
        self._mailbox = mailbox
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        body = await read_body(headers, receive, self._max_body_bytes)
        path = scope["path_params"]
        model, version = path["model"], path.get("version", "")
        self._service.repository.get(model, version)  # nobody waits for the tensors of a model that is not there
        request, form = parse_request(body, _header_length(headers), model, version)
        payload, header_length = render_response(await self._infer(request, receive), form)
        await _send(send, payload, header_length)

    async def _infer(self, request: InferRequest, receive: Receive) -> InferResponse:
        future: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        pending = self._service.submit(request, partial(self._mailbox.post, future), None)
        # Once the response is sent, `receive` returns by itself: nothing has to end this task.
        watcher: asyncio.Task[Message] = asyncio.create_task(_receive(receive))
        watcher.add_done_callback(partial(_give_up, future))
        timeout_us = request.parameters.get("timeout")
        seconds = timeout_us * 1e-6 if type(timeout_us) is int and timeout_us > 0 else None
        try:
            async with asyncio.timeout(seconds):
                answer = await future
        except (TimeoutError, ClientDisconnect, asyncio.CancelledError) as error:
            if pending is not None:
                pending.cancel()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"no answer within the request's timeout of {timeout_us} microseconds") from None
            if isinstance(error, asyncio.CancelledError):  # by uvicorn, when the grace is over
                raise Unavailable("the server is shutting down") from None
            raise
        if isinstance(answer, ServingError):
            raise answer
        return answer


async def _receive(receive: Receive) -> Message:
    return await receive()


def _give_up(future: asyncio.Future[_Answer], watcher: asyncio.Task[Any]) -> None:
    if not future.done():
        future.set_exception(ClientDisconnect())


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
