"""The server's exceptions. None of them knows a protocol: `serving.protocol.status` maps them to status codes.

    ServingError
    ├── InvalidArgument     the request is invalid; retrying it unchanged is pointless
    ├── NotFound            the model, version or RPC does not exist, or no version of the model is ready
    ├── Unauthenticated     the token is missing or wrong
    ├── PermissionDenied    the token does not permit the call
    ├── Unsupported         the request needs something that this server does not support
    ├── Unavailable         temporarily unavailable: a model is loading, or the server is shutting down; retry later
    ├── ResourceExhausted   the queue is full, a quota used up, or the message too large
    ├── DeadlineExceeded    the client's deadline, or the model's queue time-out, has passed
    ├── Cancelled           the client has cancelled the request
    └── Internal            the model or the server failed
    StartupError            the server cannot start: one line for the operator
    LoadError               a model version cannot be loaded: one sentence for the repository's index
    └── TransientLoadError  it may work later with the same files

A message is one sentence that names the expected and the received value. Any other exception that reaches a front end
is a bug: it is logged with its traceback, and the client gets Internal.
"""

MAX_QUOTED = 64
"""Characters of a client's value that a message quotes."""


def quote(value: object) -> str:
    """Returns a client's value for use in a message: on one line, shortened, strings in quotes."""
    if isinstance(value, str):
        return repr(value if len(value) <= MAX_QUOTED else f"{value[:MAX_QUOTED]}…")
    text = str(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


class ServingError(Exception):
    """Base class of all errors that are sent to a client."""


class InvalidArgument(ServingError):
    """The request is invalid."""


class NotFound(ServingError):
    """The model, version or RPC does not exist, or no version of the model is ready."""


class Unauthenticated(ServingError):
    """The token is missing or wrong."""


class PermissionDenied(ServingError):
    """The token does not permit the call."""


class Unsupported(ServingError):
    """The request needs a part of the protocol that this server does not support."""


class Unavailable(ServingError):
    """Temporarily unavailable; retry later."""


class ResourceExhausted(ServingError):
    """The queue is full, a quota is used up, or the message is too large.

    Args:
        retry_after_ms: when to retry, in milliseconds; None if retrying is pointless.
    """

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlineExceeded(ServingError):
    """The deadline has passed."""


class Cancelled(ServingError):
    """The client has cancelled the request."""


class Internal(ServingError):
    """The model or the server failed."""


class StartupError(Exception):
    """The server cannot start. The message is one line for the operator."""


class LoadError(Exception):
    """A model version cannot be loaded. The message is one sentence, which the repository's index shows."""


class TransientLoadError(LoadError):
    """A model version cannot be loaded now; it may work later with the same files: memory, a disk, a device."""
