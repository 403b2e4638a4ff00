"""Responses of all endpoints: JSON, and errors as `{"error": "one sentence"}`."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from trainer.errors import ConfigError, TrainerError
from trainer.service.methods import ForbiddenError, QuotaError, UnauthenticatedError
from trainer.service.store import JobStateError, StaleError, UnknownJobError

logger = logging.getLogger("convoy.training")

_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UnauthenticatedError, 401),
    (ForbiddenError, 403),
    (QuotaError, 429),
    (UnknownJobError, 404),
    (JobStateError, 409),
    (StaleError, 409),
    (ConfigError, 400),
    (TrainerError, 503),
)
_MESSAGES = {404: "not found: {path}", 405: "{path} does not support {method}"}


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a value as JSON."""
    body = json.dumps(value, separators=(",", ":"))
    return Response(body, status, {**_HEADERS, **(headers or {})}, media_type="application/json")


def stream_headers() -> dict[str, str]:
    """Returns headers of a response that grows: no proxy may keep or collect it."""
    return {**_HEADERS, "x-accel-buffering": "no"}


async def _on_trainer_error(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    headers = {}
    if isinstance(error, QuotaError):
        headers["retry-after"] = str(math.ceil(error.wait_s))
    elif status == 503:
        headers["retry-after"] = "1"
    elif status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response({"error": str(error)}, status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Handles unknown paths, unsupported methods and unreadable bodies."""
    assert isinstance(error, HTTPException)
    template = _MESSAGES.get(error.status_code)
    message = template.format(path=request.url.path, method=request.method) if template else error.detail
    return json_response({"error": message}, error.status_code, error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Handles a client that left before its request was complete; nobody reads the response."""
    return Response(status_code=400)


async def _on_defect(request: Request, error: Exception) -> Response:
    """Handles a defect. Starlette re-raises the error after this response, and uvicorn logs its traceback."""
    return json_response({"error": "the service failed; its log says why"}, 500)


HANDLERS: Mapping[Any, Any] = {
    TrainerError: _on_trainer_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_defect,
}
