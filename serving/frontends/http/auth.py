"""Authentication of HTTP requests: tokens, scopes and quotas, before a body is read."""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convoy.auth import TokenFile
from convoy.quotas import Quota
from convoy.web.page import is_page
from serving.errors import ServingError, Unauthenticated, quote
from serving.frontends.common.auth import (
    CHANGES_SERVER,
    INFERS,
    READS,
    READS_METRICS,
    SCOPE_METRICS,
    check_quota,
    check_scope,
)
from serving.frontends.http.responses import error_response
from serving.observability.calls import MODEL_INFER, UNKNOWN
from serving.observability.refusals import Refusals

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
"""Paths that need no token: Kubernetes' probes have none."""

_INFERS = ("/infer", "/classify")
PAGE_API = "/web/api/"

PRINCIPAL = "principal"
"""Key of the caller's `Principal` in the ASGI scope; missing if the request needs no token."""


class AuthMiddleware:
    """Refuses requests whose token does not permit them, or whose caller has used up a quota.

    Args:
        permitting: takes a request's method and path, and returns the scopes of which one permits it; None for all.
        refusals: counts the requests that are refused; None to count nothing.
        max_body_bytes: beyond which no body is read, whatever length a request declares.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: TokenFile,
        permitting: Callable[[str, str], frozenset[str] | None],
        refusals: Refusals | None = None,
        max_body_bytes: int = 0,
    ) -> None:
        self._app = app
        self._refusals = refusals
        self._tokens = tokens
        self._permitting = permitting
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        permitting = self._permitting(scope["method"], scope["path"])
        if permitting is not None:
            try:
                receive = self._admit(scope, permitting, receive)
            except ServingError as error:
                await refuse(error, self._refusals, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope, permitting: frozenset[str], receive: Receive) -> Receive:
        """Returns `receive` for an admitted request.

        Raises:
            Unauthenticated: the request has no valid token.
            PermissionDenied: the token does not permit it.
            ResourceExhausted: a quota is used up.
        """
        headers = dict(scope["headers"])
        credentials = headers.get(b"authorization")
        principal = self._tokens.find(None if credentials is None else credentials.decode("latin-1"))
        if principal is None:
            raise Unauthenticated("expected header 'Authorization: Bearer TOKEN' with a token of this server")
        scope[PRINCIPAL] = principal
        check_scope(principal, permitting, f"{scope['method']} {quote(scope['path'])}")
        length = headers.get(b"content-length")
        # httptools has checked that it is a number. A longer body is refused, and must not leave a debt of years.
        check_quota(principal, min(int(length or 0), self._max_body_bytes))
        return receive if length is not None or principal.quota is None else _counted(receive, principal.quota)


def api_scopes(method: str, path: str) -> frozenset[str] | None:
    """Returns the scopes of which one permits a request to the API; None if it needs none.

    What is neither an inference nor known to be harmless counts as a change.
    """
    if path in OPEN_PATHS or is_page(path):
        return None
    if method == "POST" and (path.endswith((*_INFERS, "/generate", "/generate_stream")) or path.startswith(PAGE_API)):
        return INFERS
    return READS if method in ("GET", "HEAD") or path == "/v2/repository/index" else CHANGES_SERVER


async def refuse(error: ServingError, refusals: Refusals | None, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers, and counts, a request that is refused before its route is known."""
    if refusals is not None:
        refusals.count_error(error, method=MODEL_INFER if scope["path"].endswith(_INFERS) else UNKNOWN)
    await error_response(error)(scope, receive, send)


def metrics_scopes(tokens: TokenFile) -> Callable[[str, str], frozenset[str] | None]:
    """Returns the same for the metrics' port: metrics are open until a line of the token file names their scope."""

    def scopes(method: str, path: str) -> frozenset[str] | None:
        return READS_METRICS if path not in OPEN_PATHS and tokens.lists(SCOPE_METRICS) else None

    return scopes


def _counted(receive: Receive, quota: Quota) -> Receive:
    """Takes a body without a declared length out of a quota, as it arrives."""

    async def receive_and_count() -> Message:
        message = await receive()
        quota.take_more(len(message.get("body", b"")))
        return message

    return receive_and_count
