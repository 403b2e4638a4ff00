"""What every path answers with: JSON, and errors as `{"error": "one sentence"}`."""

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.errors import ResourceExhausted, ServingError, Unauthenticated
from serving.protocol.status import http_status

_WORDS = {404: "there is nothing at {path}", 405: "{path} does not take {method}"}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII, so that no string that a caller sent can fail to be encoded."""
    body = json.dumps(value, separators=(",", ":"))
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ServingError) -> Response:
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
    """What HTTP itself has to say: no such path, wrong method, a body that was not taken."""
    assert isinstance(error, HTTPException)
    words = _WORDS.get(error.status_code, error.detail)
    message = words.format(path=request.url.path, method=request.method) if error.status_code in _WORDS else words
    return json_response({"error": message}, error.status_code, error.headers)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads it; the status is for the access log."""
    return Response(status_code=499)


async def on_defect(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, and uvicorn logs it with its traceback."""
    return json_response({"error": "the server failed; its log says why"}, 500)


EXCEPTION_HANDLERS = {
    ServingError: on_serving_error,
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
    Exception: on_defect,
}
