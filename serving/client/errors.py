"""The client's one exception, and its conversion from gRPC's."""

from typing import Any

START_HINT = "start it with convoy serve --model-repository models"

_NO_CONNECTION = (
    "connections to all backends failing",
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
)
"""First words of the details of an UNAVAILABLE that gRPC's core raises because it has no connection."""
_CLIENT_DEADLINE = "Deadline Exceeded"
"""The details of a DEADLINE_EXCEEDED that the client's own gRPC core raises."""


class ClientError(Exception):
    """A call failed.

    Args:
        code: name of the gRPC status code, such as `NOT_FOUND`; `INVALID_ARGUMENT` also if the client rejects an
            argument itself.
        message: one line.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def invalid_argument(message: str) -> ClientError:
    """Returns the error for an invalid argument, of which nothing was sent."""
    return ClientError("INVALID_ARGUMENT", message)


def from_rpc(error: Any, target: str, timeout_s: float) -> ClientError:
    """Converts a `grpc.RpcError` that has a status code. The message names the server, or is the server's."""
    code, details = error.code().name, " ".join((error.details() or "").split())
    if code == "UNAVAILABLE" and details.startswith(_NO_CONNECTION):
        return ClientError(code, _no_connection(target, details))
    if code == "DEADLINE_EXCEEDED" and details == _CLIENT_DEADLINE:
        return ClientError(code, f"no response from {target} within {timeout_s:g} s")
    return ClientError(code, details or f"{target} gave no reason")


def _no_connection(target: str, details: str) -> str:
    reason = details.rpartition("last error: ")[2]
    if "handshake" in reason.lower() or "CERTIFICATE" in reason:
        return f"no TLS connection to {target}: {reason}"
    if "resolving" in details or "DNS" in details:
        return f"cannot resolve {target}: {reason}"
    return f"no server responds at {target}: {reason.rpartition(': ')[2]}; {START_HINT}"
