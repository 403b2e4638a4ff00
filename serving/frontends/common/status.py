"""The status with which a call ends: its details, and its code for calls that get no response."""

import time

from serving.errors import ServingError, Unavailable

_CANCELLED = 1
_DEADLINE_EXCEEDED = 4
_MAX_DETAIL_BYTES = 2000
"""Of an error's text: it travels in a header, percent-encoded, and clients accept 8 KiB of headers by default."""


def status_details(error: ServingError) -> str:
    """Returns an error's text, cut to what fits in a header."""
    return str(error).encode("utf-8", "replace")[:_MAX_DETAIL_BYTES].decode("utf-8", "ignore")


def code_without_response(deadline: float | None) -> int:
    """Returns the gRPC status code of a call that ended before the server responded.

    Args:
        deadline: on the clock of `time.monotonic`; None for none.
    """
    return _DEADLINE_EXCEEDED if deadline is not None and time.monotonic() >= deadline else _CANCELLED


def shutting_down() -> Unavailable:
    """Returns the error for calls that arrive, or are still open, while the server stops."""
    return Unavailable("the server is shutting down")
