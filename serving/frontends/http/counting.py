"""Counts the answers of HTTP's endpoints other than inference. Refusals are counted where errors become responses."""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.observability.calls import INFER, Calls, method_of
from serving.protocol.status import NAMES, OK


def counted(routes: Sequence[Route], calls: Calls) -> list[Route]:
    """Returns routes that do the same, and count."""
    return [route if method_of(route.endpoint) == INFER else _counted(route, calls) for route in routes]


def _counted(route: Route, calls: Calls) -> Route:
    endpoint: Callable[[Request], Awaitable[Response]] = route.endpoint

    @wraps(endpoint)
    async def answer(request: Request) -> Response:
        began = time.monotonic()
        response = await endpoint(request)
        calls.record(method_of(endpoint), NAMES[OK], time.monotonic() - began)
        return response

    return Route(route.path, answer, methods=list(route.methods or ()))
