"""The fast path of inference requests over HTTP whose head repeats that of the request before.

A client that sends one image after the other over a connection sends the same head each time. httptools, uvicorn and
Starlette take longer for such a request than everything else together. So a connection remembers its last head, and a
request that arrives whole, in one piece, and begins with the same bytes goes directly to the service: those bytes have
been parsed, and mean the same again. Tokens are checked each time. Whatever is unusual takes the slow path, through
httptools, uvicorn and Starlette: other forms of requests, callers with quotas, plans that are not cached, and servers
that drain.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

from starlette.responses import Response

from convoy.auth import TokenFile
from convoy.same_origin import HostCheck
from serving.errors import ServingError
from serving.frontends.common.auth import INFERS
from serving.frontends.common.status import log_failure, shutting_down
from serving.frontends.http.executor import BoundedExecutor
from serving.frontends.http.infer import HEADER_LENGTH, response_headers
from serving.frontends.http.loop_bridge import LoopBridge, Result, start_task
from serving.frontends.http.responses import error_response
from serving.inference.request import NO_CONTEXT, RequestContext, RequestHandle
from serving.inference.service import InferenceService
from serving.observability.logging import AccessLogEntry
from serving.protocol.json_infer import MAX_INLINE_OUTPUT_BYTES, JsonRequest, JsonResponse

MAX_HEAD_BYTES = 2048
"""Of a head that is remembered."""

_PATH = re.compile(rb"/v2/models/([^/%]+)(?:/versions/([^/%]+))?/infer")
_SPECIAL = frozenset(
    {b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"proxy-connection", b"origin", b"traceparent"}
)
"""Headers of requests that take the slow path."""


class KnownHead:
    """A head of an inference whose tensors follow its JSON as bytes.

    Attributes:
        credentials: the header `authorization`; None without one.
        method: for the access log.
        model: its name.
        num_bytes: of the head and the body.
    """

    __slots__ = ("_length", "_size", "_version", "credentials", "method", "model", "num_bytes")

    def __init__(self, size: int, path: re.Match[bytes], headers: dict[bytes, bytes]) -> None:
        self._size = size
        self.model, self._version = str(path[1], "ascii"), str(path[2] or b"", "ascii")
        self._length = int(headers[HEADER_LENGTH])
        credentials = headers.get(b"authorization")
        self.credentials = None if credentials is None else credentials.decode("latin-1")
        self.method = f"POST {str(path[0], 'ascii')}"
        self.num_bytes = size + int(headers[b"content-length"])

    def request(self, data: bytes) -> JsonRequest:
        """Returns the request in the bytes of a head and a body."""
        return JsonRequest(memoryview(data)[self._size :], self._length, self.model, self._version)


class Connection(Protocol):
    """A connection, as its `Exchange` sees it."""

    scope: Any
    """ASGI's scope of the request that httptools has parsed last."""

    @property
    def peer(self) -> str:
        """The client's address."""

    def send_response(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Sends the response of the exchange, and goes on to the next request."""


class FastPath:
    """The fast path of one port.

    Args:
        executor: renders large responses.
        is_ending: whether requests should take the slow path, where they are refused or end their connections.
        max_body_bytes: of requests and responses.
        hosts: refuses names of hosts, whose requests take the slow path; None to refuse none.
    """

    def __init__(  # noqa: PLR0913 (all that the slow path checks)
        self,
        service: InferenceService,
        executor: BoundedExecutor,
        *,
        is_ending: Callable[[], bool],
        max_body_bytes: int,
        tokens: TokenFile | None,
        hosts: HostCheck | None,
        access_log: bool,
    ) -> None:
        self.bridge = LoopBridge(asyncio.get_running_loop())
        self.service = service
        self.is_ending = is_ending
        self.executor = executor
        self.max_body_bytes = max_body_bytes
        self.tokens = tokens
        self.hosts = hosts
        self.access_log = access_log

    def recognise(self, head: bytes, scope: Mapping[str, Any]) -> KnownHead | None:
        """Returns what a head says that httptools has parsed; None if its requests take the slow path."""
        path = _PATH.fullmatch(scope["raw_path"])
        headers = dict(scope["headers"])
        numbers = [headers.get(name, b"") for name in (b"content-length", HEADER_LENGTH)]
        if (
            path is None
            or scope["method"] != "POST"
            or scope["http_version"] != "1.1"
            or not _SPECIAL.isdisjoint(headers)
            or headers.get(b"connection", b"keep-alive").lower() != b"keep-alive"
            or not all(number.isdigit() and len(number) <= 18 for number in numbers)
            or int(numbers[0]) > self.max_body_bytes
            or (self.hosts is not None and self.hosts.refuses(headers.get(b"host", b"").decode("latin-1")))
        ):
            return None
        return KnownHead(len(head), path, headers)


class Exchange:
    """The requests of one connection on the fast path, one after the other; a `ResponseSink` of each.

    To uvicorn it looks like a `RequestResponseCycle`, so that the next request waits for its response.

    Attributes:
        head: of the request that httptools has parsed last; empty if requests that repeat it take the slow path.
    """

    message_event = SimpleNamespace(set=lambda: None)  # uvicorn sets it when a connection is lost: nothing waits for it
    more_body = False
    response_started = False

    def __init__(self, fast_path: FastPath, connection: Connection) -> None:
        self.head = self._slow_head = b""
        self._known: KnownHead | None = None  # what the head says
        self._fast_path = fast_path
        self._connection = connection
        self._request: RequestHandle | None = None
        self._model = ""
        self._entry: AccessLogEntry | None = None
        self.response_complete = True
        self.keep_alive = True
        self.disconnected = False

    def remember(self, piece: bytes) -> None:
        """Remembers the head that has been parsed, if a piece begins with it."""
        end = piece.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        head = piece[:end] if end > 3 and piece.startswith(b"POST /") else b""
        if head and head != self._slow_head:
            self.head, self._known = head, None

    def start(self, data: bytes) -> bool:
        """Starts a request that begins with `head`. Returns False if it has to take the slow path."""
        fast_path, known = self._fast_path, self._known
        if known is None:
            known = self._known = fast_path.recognise(self.head, self._connection.scope)
            if known is None:
                self._slow_head, self.head = self.head, b""
                return False
        if len(data) != known.num_bytes or fast_path.is_ending():
            return False
        context = NO_CONTEXT
        if fast_path.tokens is not None:
            principal = fast_path.tokens.find(known.credentials)
            if principal is None or principal.quota is not None or principal.scopes.isdisjoint(INFERS):
                return False
            context = RequestContext(principal=principal)
        if fast_path.service.tracing is not None:
            context = RequestContext(principal=context.principal, trace=fast_path.service.tracing.begin_http({}))
        entry = AccessLogEntry(known.method, self._connection.peer) if fast_path.access_log else None
        request = fast_path.service.infer_json_if_cached(known.request(data), context, self)
        if request is None:
            return False
        self._request, self._model = request, known.model
        if entry is not None:
            entry.principal = context.principal
            self._entry = entry
        self.response_complete = False
        return True

    def succeed(self, response: JsonResponse) -> None:
        self._fast_path.bridge.pass_on(self._finish, response)

    def fail(self, error: ServingError) -> None:
        self._fast_path.bridge.pass_on(self._finish, error)

    def cancel(self) -> None:
        """Drops the request: the client has disconnected."""
        if self._request is not None:
            self._request.cancel()
            self._end(499)

    def expire(self) -> bool:
        """Answers a request that the grace period cuts off. Returns whether there was one."""
        if self._request is None:
            return False
        self._request.cancel()
        self._finish(shutting_down())
        return True

    def _finish(self, result: Result) -> None:
        if self._request is None:  # it was cancelled
            return
        if isinstance(result, ServingError):
            self._send_error(error_response(result))
        elif result.size_in_json > MAX_INLINE_OUTPUT_BYTES:
            start_task(self._finish_elsewhere(result))
        else:
            self._render(result)

    def _render(self, response: JsonResponse) -> None:
        try:
            body, json_length = response.render(self._fast_path.max_body_bytes)
        except Exception as error:
            self._refuse(error)
        else:
            self._send(200, response_headers(body, json_length), body)

    async def _finish_elsewhere(self, response: JsonResponse) -> None:
        try:
            body, json_length = await self._fast_path.executor.run(response.render, self._fast_path.max_body_bytes)
        except Exception as error:
            self._refuse(error)
        else:
            self._send(200, response_headers(body, json_length), body)

    def _refuse(self, error: Exception) -> None:
        """Answers, and counts, a request whose response cannot be rendered: the model's statistics have it as good."""
        if not isinstance(error, ServingError):
            error = log_failure("rendering a response")
        self._fast_path.service.refusals.count_error(error, self._model)
        self._send_error(error_response(error))

    def _send_error(self, response: Response) -> None:
        self._send(response.status_code, response.raw_headers, bytes(response.body))

    def _send(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        if self._request is not None:
            self._end(status)
            self._connection.send_response(status, headers, body)

    def _end(self, status: int) -> None:
        self._request = None  # it refers to this exchange
        self.response_complete = True
        if self._entry is not None:
            self._entry.end(status)
            self._entry = None
