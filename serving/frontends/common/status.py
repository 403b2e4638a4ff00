"""The code with which a call ends that gets no response, and the error of calls during a stop."""

import time

from serving.errors import Unavailable

_CANCELLED = 1
_DEADLINE_EXCEEDED = 4


def code_without_response(deadline: float | None) -> int:
    """Returns the gRPC status code of a call that ended before the server responded.

    Args:
        deadline: on the clock of `time.monotonic`; None for none.
    """
    return _DEADLINE_EXCEEDED if deadline is not None and time.monotonic() >= deadline else _CANCELLED


def shutting_down() -> Unavailable:
    """Returns the error for calls that arrive, or are still open, while the server stops."""
    return Unavailable("the server is shutting down")
