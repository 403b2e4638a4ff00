"""Responses of all endpoints: JSON, and errors as `{"error": "one sentence"}`."""

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.errors import ResourceExhausted, ServingError, Unauthenticated, Unavailable
from serving.frontends.http.counting import method_of
from serving.models.repository import Repository
from serving.observability.calls import UNKNOWN
from serving.observability.refusals import Refusals
from serving.protocol.status import http_status, status_name

SUBMITTED = "convoy.submitted"
"""Key of a scope: the service has the request, and counts what becomes of it."""
TRACE = "convoy.trace"
"""Key of a scope: the request's trace; None or missing for a request that is not traced."""

_REASONS = {404: "not_found", 405: "unimplemented", 413: "resource_exhausted", 415: "unimplemented"}
"""Of `serving.observability.refusals`, by status."""
_MESSAGES = {404: "not found: {path}", 405: "{path} does not support {method}"}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a value as JSON in ASCII: a client's string with a lone surrogate cannot be encoded in UTF-8."""
    body = json.dumps(value, separators=(",", ":"))
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ServingError) -> Response:
    """Returns an error with its status code, and the headers that say what to do about it."""
    headers = {}
    if isinstance(error, ResourceExhausted) and error.retry_after_ms is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_ms / 1000))
    elif isinstance(error, Unavailable):
        headers["retry-after"] = "1"
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return json_response({"error": str(error)}, http_status(error), headers)


class ErrorHandlers:
    """Turns exceptions into responses, counts the requests that they refuse, and ends their traces.

    Args:
        refusals: counts requests that the service has not seen; None to count nothing.
        repository: whose models may be named in a count.
    """

    def __init__(self, refusals: Refusals | None = None, repository: Repository | None = None) -> None:
        self._refusals = refusals
        self._repository = repository
        self.by_exception: Mapping[Any, Any] = {
            ServingError: self._on_serving_error,
            HTTPException: self._on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: self._on_defect,
        }

    async def _on_serving_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ServingError)
        if (trace := request.scope.get(TRACE)) is not None:
            trace.end(error)
        self._count(request, status_name(error).lower())
        return error_response(error)

    async def _on_http_error(self, request: Request, error: Exception) -> Response:
        """Handles unknown paths, unsupported methods and unreadable bodies."""
        assert isinstance(error, HTTPException)
        self._count(request, _REASONS.get(error.status_code, "invalid_argument"))
        template = _MESSAGES.get(error.status_code)
        message = template.format(path=request.url.path, method=request.method) if template else error.detail
        return json_response({"error": message}, error.status_code, error.headers)

    async def _on_defect(self, request: Request, error: Exception) -> Response:
        """Handles a defect. Starlette re-raises the error after this response, and uvicorn logs its traceback."""
        self._count(request, "internal")
        return json_response({"error": "the server failed; its log says why"}, 500)

    def _count(self, request: Request, reason: str) -> None:
        if self._refusals is None or self._repository is None or request.scope.get(SUBMITTED):
            return
        model = request.path_params.get("model", "")
        try:
            self._repository.versions(model)
        except ServingError:
            model = ""
        endpoint = request.scope.get("endpoint")
        self._refusals.count(reason, model, UNKNOWN if endpoint is None else method_of(endpoint))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Handles a client that has disconnected: the status is for the access log."""
    return Response(status_code=499)
