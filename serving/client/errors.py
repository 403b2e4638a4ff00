"""What can go wrong for a caller: one exception, and its making from gRPC's."""

from typing import Any

START_HINT = "start it with python -m serving --model-repository models"

_NO_CONNECTION = (
    "connections to all backends failing",
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
)
"""How gRPC's core begins an UNAVAILABLE of its own, made before any server has answered."""
_OWN_DEADLINE = "Deadline Exceeded"


class ClientError(Exception):
    """A call that brought no answer.

    Args:
        code: the name of the gRPC status code, such as `NOT_FOUND`; `INVALID_ARGUMENT` too for what is refused before
            it is sent.
        message: one line.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def invalid(message: str) -> ClientError:
    """What the caller gave is wrong, and nothing was sent."""
    return ClientError("INVALID_ARGUMENT", message)


def from_rpc(error: Any, target: str, timeout_s: float) -> ClientError:
    """gRPC's error (a `grpc.RpcError` that has a code) in one line that says who did not answer, or what it said."""
    code, details = error.code().name, " ".join((error.details() or "").split())
    if code == "UNAVAILABLE" and details.startswith(_NO_CONNECTION):
        return ClientError(code, _no_connection(target, details))
    if code == "DEADLINE_EXCEEDED" and details == _OWN_DEADLINE:
        return ClientError(code, f"no answer from {target} within {timeout_s:g} s")
    return ClientError(code, details or f"{target} gave no reason")


def _no_connection(target: str, details: str) -> str:
    reason = details.rpartition("last error: ")[2]
    if "handshake" in reason.lower() or "CERTIFICATE" in reason:
        return f"no TLS connection to {target}: {reason}"
    if "resolving" in details or "DNS" in details:
        return f"no address is known for {target}: {reason}"
    return f"no server at {target} answers: {reason.rpartition(': ')[2]}; {START_HINT}"
