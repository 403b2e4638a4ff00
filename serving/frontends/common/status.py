"""Errors of calls that end without a response: cancelled, past their deadline, during a stop, or by a defect."""

import logging
import time

from serving.errors import Internal, Unavailable

logger = logging.getLogger(__name__)

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


def log_failure(path: str) -> Internal:
    """Logs the exception that is being handled. Returns the error for the client."""
    logger.exception("%s failed", path)
    return Internal("the server failed; its log says why")
