"""The errors of the server as one tree. None of them knows a protocol: `serving.protocol.status` maps them to codes.

    ServingError
    ├── InvalidArgument     the request is wrong: trying again without a change is pointless
    ├── NotFound            no such model, version or RPC, or a model of which no version is ready
    ├── Unauthenticated     no token, or a wrong one
    ├── Unsupported         a request for something that this server does not do
    ├── Unavailable         not now: a model that is loading, a version that has failed, a server that is leaving
    ├── ResourceExhausted   the queue is full; says when to try again
    ├── DeadlineExceeded    the caller's time is up, or the model's queue time-out
    ├── Cancelled           the caller has gone
    └── Internal            the model, or we, failed
    StartupError            the server cannot start: one line for the operator
    LoadError               a model version cannot be loaded: one sentence for the repository's index

Messages are one sentence that names what was expected and what came. Anything else that reaches the top is a defect: it
is logged with its traceback and answered as Internal.
"""

MAX_SHOWN = 64
"""Characters of what a caller sent, in a message."""


def quote(sent: object) -> str:
    """What a caller sent as it stands in a message: text in quotes, on one line, never long."""
    if isinstance(sent, str):
        return repr(sent if len(sent) <= MAX_SHOWN else f"{sent[:MAX_SHOWN]}…")
    text = str(sent)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


class ServingError(Exception):
    """Root of all errors that are answered to a caller."""


class InvalidArgument(ServingError):
    """The request is wrong."""


class NotFound(ServingError):
    """No such model, version or RPC."""


class Unauthenticated(ServingError):
    """No token, or a wrong one."""


class Unsupported(ServingError):
    """Part of the protocol, but nothing that this server does."""


class Unavailable(ServingError):
    """Not now."""


class ResourceExhausted(ServingError):
    """No room: the queue is full, or the message too large.

    Args:
        retry_after_ms: when to try again; None if there is no use in it.
    """

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlineExceeded(ServingError):
    """Too late for the caller."""


class Cancelled(ServingError):
    """The caller has gone."""


class Internal(ServingError):
    """The model, or we, failed."""


class StartupError(Exception):
    """The server cannot start; `str` is the one line for the operator."""


class LoadError(Exception):
    """A model version cannot be loaded; `str` is the reason, one sentence, as it stands in the repository's index."""
