"""What each caller may do: tokens, scopes and quotas, the same for gRPC and HTTP.

The scope `infer` permits inference, `admin` permits loading and unloading models and whatever else changes the server,
and either of them permits everything that only reads. `metrics` permits to read the metrics.
"""

import math
from collections.abc import Iterable

from convoy.auth import Principal, TokenFile
from serving.errors import PermissionDenied, ResourceExhausted, Unauthenticated
from serving.protocol.methods import CHANGES, HEALTH_CHECK, HEALTH_WATCH, INFER, STREAM_INFER

SCOPES = SCOPE_INFER, SCOPE_ADMIN, SCOPE_METRICS = ("infer", "admin", "metrics")

INFERS = frozenset({SCOPE_INFER})
CHANGES_SERVER = frozenset({SCOPE_ADMIN})
READS = frozenset({SCOPE_INFER, SCOPE_ADMIN})
READS_METRICS = frozenset({SCOPE_METRICS})
"""Kinds of calls, as the scopes that permit them."""

_METHODS = dict.fromkeys((INFER, STREAM_INFER), INFERS) | dict.fromkeys(CHANGES, CHANGES_SERVER)
"""All other methods only read."""
_OPEN_METHODS = (HEALTH_CHECK, HEALTH_WATCH)
"""Methods that need no token: Kubernetes' probes have none."""


def check_token(tokens: TokenFile | None, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Principal | None:
    """Finds the caller of a gRPC method.

    Args:
        tokens: None if the server asks for none.
        method: full name, as in `serving.protocol.methods`.
        metadata: of the call.

    Returns:
        The caller; None if it needs no token.

    Raises:
        Unauthenticated: the metadata have no token, or a wrong one.
    """
    if tokens is None or method in _OPEN_METHODS:
        return None
    principal = tokens.find(credentials_of(metadata))
    if principal is None:
        raise Unauthenticated("expected metadata 'authorization: Bearer TOKEN' with a token of this server")
    return principal


def credentials_of(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Returns the value of `authorization` in the metadata of a call; None without one."""
    value = next((value for key, value in metadata if key == "authorization"), None)
    return value if isinstance(value, str) else None


def token_revoked() -> Unauthenticated:
    """Returns the error of a call that was open when its token was revoked."""
    return Unauthenticated("the token of this call is no longer valid")


def check_method(principal: Principal | None, method: str) -> None:
    """Checks that a caller may call a gRPC method.

    Raises:
        PermissionDenied: its token does not permit the method.
    """
    if principal is not None:
        check_scope(principal, _METHODS.get(method, READS), method.rpartition("/")[2])


def admit(
    tokens: TokenFile | None, method: str, metadata: Iterable[tuple[str, str | bytes]], num_bytes: int
) -> Principal | None:
    """Makes all checks of a message. Returns its caller; None if it needs no token.

    Raises:
        Unauthenticated: the metadata have no token, or a wrong one.
        PermissionDenied: its token does not permit the method.
        ResourceExhausted: a quota is used up.
    """
    principal = check_token(tokens, method, metadata)
    check_method(principal, method)
    check_quota(principal, num_bytes)
    return principal


def check_scope(principal: Principal, permitting: frozenset[str], what: str) -> None:
    """Checks that a principal has one of the scopes that permit a call.

    Args:
        what: the call, for the message.

    Raises:
        PermissionDenied: it has none.
    """
    if principal.scopes.isdisjoint(permitting):
        needed, found = " or ".join(sorted(permitting)), ", ".join(sorted(principal.scopes))
        raise PermissionDenied(f"{what} needs the scope {needed}; the token of '{principal.name}' has {found}")


def check_quota(principal: Principal | None, num_bytes: int) -> None:
    """Takes a request out of its caller's quotas. Callers without quotas pass.

    Args:
        num_bytes: of the message.

    Raises:
        ResourceExhausted: a quota is used up; with the time after which to retry.
    """
    if principal is None or principal.quota is None:
        return
    wait_s = principal.quota.take(num_bytes)
    if wait_s > 0:
        retry_ms = math.ceil(1000 * wait_s)
        raise ResourceExhausted(f"the quota of '{principal.name}' is used up: retry in {retry_ms} ms", retry_ms)
