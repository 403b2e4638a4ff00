"""Responses of all endpoints: JSON, and errors as `{"error": "one sentence"}`."""

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.errors import ResourceExhausted, ServingError, Unauthenticated
from serving.protocol.status import http_status

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
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return json_response({"error": str(error)}, http_status(error), headers)


async def on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handles unknown paths, unsupported methods and unreadable bodies."""
    assert isinstance(error, HTTPException)
    template = _MESSAGES.get(error.status_code)
    message = template.format(path=request.url.path, method=request.method) if template else error.detail
    return json_response({"error": message}, error.status_code, error.headers)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Handles a client that has disconnected: the status is for the access log."""
    return Response(status_code=499)


async def on_defect(request: Request, error: Exception) -> Response:
    """Handles a defect. Starlette re-raises the error after this response, and uvicorn logs its traceback."""
    return json_response({"error": "the server failed; its log says why"}, 500)


EXCEPTION_HANDLERS = {
    ServingError: on_serving_error,
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
    Exception: on_defect,
}
