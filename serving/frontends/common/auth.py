"""Checks the token of gRPC calls."""

from collections.abc import Iterable

from convoy.auth import Token
from serving.errors import Unauthenticated
from serving.protocol.methods import HEALTH_CHECK, HEALTH_WATCH

OPEN_METHODS = (HEALTH_CHECK, HEALTH_WATCH)
"""Methods that need no token: Kubernetes' probes have none."""


def check_token(token: Token | None, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Checks that a client may call a method.

    Args:
        token: None if the server asks for none.
        method: full name, as in `serving.protocol.methods`.
        metadata: of the call.

    Raises:
        Unauthenticated: the metadata have no token, or a wrong one.
    """
    if token is None or method in OPEN_METHODS:
        return
    credentials = next((value for key, value in metadata if key == "authorization"), None)
    if not isinstance(credentials, str) or not token.accepts(credentials):
        raise Unauthenticated("expected metadata 'authorization: Bearer TOKEN' with this server's token")
