"""The infer endpoint."""

from contextlib import suppress

from starlette.types import Receive, Scope, Send

from serving.errors import InvalidArgument
from serving.frontends.http.auth import PRINCIPAL
from serving.frontends.http.body import read_body
from serving.frontends.http.executor import MAX_INLINE_BYTES, BoundedExecutor
from serving.frontends.http.loop_bridge import LoopBridge, await_response
from serving.frontends.http.responses import SUBMITTED, TRACE
from serving.inference.queue_policy import scheduling_of
from serving.inference.request import RequestContext
from serving.inference.service import InferenceService
from serving.observability.tracing import Tracing
from serving.protocol.json_infer import MAX_INLINE_OUTPUT_BYTES, JsonRequest, JsonResponse

HEADER_LENGTH = b"inference-header-content-length"


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
        timeout_s = None
        if "timeout" in (parameters := request.parse().parameters):
            with suppress(InvalidArgument):  # the service refuses the request, in its own order of checks
                timeout_s = scheduling_of(parameters, policies).timeout_s
        scope[SUBMITTED] = True
        response: JsonResponse = await await_response(
            self._bridge, lambda sink: self._service.infer_json(request, context, sink), timeout_s, receive
        )
        scope[SUBMITTED] = False  # what goes wrong from here on is not in the model's statistics
        if response.size_in_json > MAX_INLINE_OUTPUT_BYTES:
            payload, length = await self._executor.run(response.render, self._max_body_bytes)
        else:
            payload, length = response.render(self._max_body_bytes)
        await send({"type": "http.response.start", "status": 200, "headers": response_headers(payload, length)})
        await send({"type": "http.response.body", "body": payload})


def begin_request(scope: Scope, headers: dict[bytes, bytes], tracing: Tracing | None) -> RequestContext:
    """Returns the context of an inference. If it fails, `ErrorHandlers` end its trace."""
    scope[TRACE] = trace = None if tracing is None else tracing.begin_http(headers)
    return RequestContext(principal=scope.get(PRINCIPAL), trace=trace)


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
