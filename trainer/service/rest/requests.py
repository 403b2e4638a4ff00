"""Reads requests, within limits of size and time, and refuses those that another web page sends."""

import asyncio
import re
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from convoy.same_origin import HostCheck, is_own_page
from trainer.errors import ConfigError
from trainer.service.jobs import MAX_NUMBER
from trainer.service.logs import Position
from trainer.service.rest.responses import json_response

M = TypeVar("M", bound=Message)

MAX_BODY_BYTES = 1024 * 1024
HEALTH_PATHS = LIVE, READY = "/v1/health/live", "/v1/health/ready"
BODY_S = 30.0
"""Longest time that a request's body may take to arrive."""
_POSITION = re.compile(r"([0-9]{1,9}):([0-9]{1,18})")


async def read_message(request: Request, message: M) -> M:
    """Returns a message filled from the JSON object in the body; as it is if there is no body.

    Raises:
        ConfigError: the body is no such object.
        HTTPException: 408, 413 or 415.
    """
    body = await _read_body(request)
    if not body:
        return message
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the request body must be application/json")
    try:
        json_format.Parse(body, message)
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the request body: {' '.join(str(error).split())}") from error
    return message


def integer(request: Request, name: str, default: int | None = None) -> int | None:
    """Returns a parameter of the query that is a whole number.

    Raises:
        ConfigError: it is none.
    """
    text = request.query_params.get(name)
    return default if text is None else parse_integer(text, name)


def parse_integer(text: str, name: str) -> int:
    """Returns a number that is at least 0.

    Raises:
        ConfigError: the text is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_NUMBER):
        raise ConfigError(f"{name}={text[:40]}: must be a whole number from 0 to {MAX_NUMBER}")
    return int(text)


def parse_position(text: str, name: str) -> Position:
    """Returns the place in a job's logs that `ATTEMPT:OFFSET` names.

    Raises:
        ConfigError: it names none.
    """
    found = _POSITION.fullmatch(text)
    if found is None:
        raise ConfigError(f"{name}={text[:40]}: must be ATTEMPT:OFFSET, the id of an event of this log")
    return Position(int(found[1]), int(found[2]))


def flag(request: Request, name: str) -> bool:
    """Returns a parameter of the query that is true or false.

    Raises:
        ConfigError: it is neither.
    """
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "1", "false", "0", ""):
        raise ConfigError(f"{name}={text[:40]}: must be true or false")
    return text in ("true", "1")


class SameOriginMiddleware:
    """Refuses requests that a web page of another origin may have sent through its reader's browser.

    For ports without tokens: they trust everybody on this machine, but not the pages that a browser here shows. Health
    is told to anybody.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._hosts = HostCheck()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send)
        elif self._hosts.refuses(host):
            refused = json_response({"error": f"Host {host!r}: a port without tokens serves this machine only"}, 403)
            await refused(scope, receive, send)
        elif not is_own_page(origin, host):
            refused = json_response({"error": f"Origin {origin!r}: another site's page may not use this service"}, 403)
            await refused(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def _read_body(request: Request) -> bytes:
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the request body is too large: at most {MAX_BODY_BYTES} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(408, f"the request body took longer than {BODY_S:g} s") from None
    return b"".join(chunks)


def path_number(request: Request) -> int:
    """Returns the number of the job in the path."""
    number: int = request.path_params["id"]
    return number
