"""Brings the responses of inferences from the threads that compute them to the event loop, which awaits them."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serving.errors import DeadlineExceeded, ServingError
from serving.frontends.common.status import shutting_down
from serving.inference.request import RequestHandle
from serving.protocol.json_infer import JsonResponse

logger = logging.getLogger(__name__)

WATCH_AFTER_S = 0.01
"""When to begin to watch for a client that disconnects. Most responses come sooner, and a task costs as much as one."""

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


async def await_response(
    bridge: LoopBridge, start: Callable[[Any], RequestHandle | None], timeout_s: float | None, receive: Receive
) -> Any:
    """Starts an inference, and returns its response. Cancels it when its client disconnects or its time is up.

    Args:
        start: hands the request to the service, with a `ResponseSink` of any kind of response.
        timeout_s: None for no limit.

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
        if timeout_s is None:
            result = await future
        else:
            async with asyncio.timeout(timeout_s):
                result = await future
    except (TimeoutError, ClientDisconnect, asyncio.CancelledError) as error:
        if handle is not None:
            handle.cancel()
        if timeout_s is not None and isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"no response within the timeout of {1e6 * timeout_s:.0f} microseconds") from None
        if isinstance(error, asyncio.CancelledError):  # uvicorn cancels it when the grace period is over
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

    start_task(wait_for_disconnect())


def start_task(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine as a task that nothing awaits. Asyncio itself keeps no reference to a running task."""
    _tasks.add(task := asyncio.create_task(coroutine))
    task.add_done_callback(_tasks.discard)


_tasks: set[asyncio.Task[None]] = set()
