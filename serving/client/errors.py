"""The client's one exception, and its conversion from gRPC's."""

import re
from typing import Any

DEFAULT_PORT = 8001
START_HINT = "start it with convoy serve --model-repository models"

_NO_CONNECTION = (
    "connections to all backends failing",
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
)
"""First words of the details of an UNAVAILABLE that gRPC's core raises because it has no connection."""
_NOBODY_LISTENS = ("Connection refused", "No such file or directory")
_UNKNOWN_AUTHORITY = ("self signed certificate", "certificate in certificate chain", "local issuer certificate")
_CLIENT_DEADLINE = ("Deadline Exceeded", "Stream removed (Deadline Exceeded)")
"""The details of a DEADLINE_EXCEEDED that the client's own gRPC core raises, before and after a response has begun."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NOT_READ = "Exception deserializing response!"
"""The details of an INTERNAL that the client's own gRPC raises."""


class ClientError(Exception):
    """A call failed.

    Args:
        code: name of the gRPC status code, such as `NOT_FOUND`; `INVALID_ARGUMENT` also if the client rejects an
            argument itself.
        message: one line.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # so that it can be pickled
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def invalid_argument(message: str) -> ClientError:
    """Returns the error for an invalid argument, of which nothing was sent."""
    return ClientError("INVALID_ARGUMENT", message)


def invalid_response(reason: object) -> ClientError:
    """Returns the error for a response that the protocol does not allow."""
    return ClientError("INTERNAL", f"the server's response is invalid: {reason}")


def no_response(target: str, timeout_s: float) -> ClientError:
    """Returns the error for a call whose time-out has passed."""
    return ClientError("DEADLINE_EXCEEDED", f"no response from {target} within {timeout_s:g} s")


def from_rpc(error: Any, target: str, timeout_s: float) -> ClientError:
    """Converts a `grpc.RpcError` that has a status code. The message names the server, or is the server's."""
    code, details = error.code().name, " ".join(_CONTROL.sub(" ", error.details() or "").split())
    if code == "UNAVAILABLE" and details.startswith(_NO_CONNECTION):
        return ClientError(code, _no_connection(target, details))
    if code == "DEADLINE_EXCEEDED" and details in _CLIENT_DEADLINE:
        return no_response(target, timeout_s)
    if code == "INTERNAL" and details == _NOT_READ:
        return invalid_response("it cannot be parsed")
    return ClientError(code, details or f"{target} gave no reason")


def _no_connection(target: str, details: str) -> str:
    reason = details.rpartition("last error: ")[2]
    if "WRONG_VERSION_NUMBER" in reason:
        return f"no TLS connection to {target}: what listens there does not use TLS"
    if "handshake" in reason.lower() or "CERTIFICATE" in reason:
        reason = reason.rpartition("OPENSSL_internal:")[2].removesuffix(": OK")
        hint = "; name its authority by --tls-ca (in Python, Tls(ca=…))" if reason.endswith(_UNKNOWN_AUTHORITY) else ""
        return f"no TLS connection to {target}: {reason}{hint}"
    if "resolving" in details or "DNS" in details:
        return f"cannot resolve {target}: {reason.rpartition(': ')[2].rstrip(']')}"
    reason = reason.rpartition(": ")[2].partition(" (")[0]
    if reason.startswith(_NOBODY_LISTENS):
        return f"no server responds at {target}: {reason}; {START_HINT}"
    return (
        f"what listens at {target} takes no gRPC from this client: {reason}; is that the port of gRPC, by default "
        f"{DEFAULT_PORT}, and does it need TLS or a client certificate?"
    )
