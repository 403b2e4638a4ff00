"""Limits how often a long export logs its progress."""

from collections.abc import Callable
from time import monotonic

INTERVAL_S = 5.0


def throttled(log: Callable[[str], None]) -> Callable[[str], None]:
    """Returns a function that logs the line it is given, unless it has logged one in the last `INTERVAL_S`."""
    logged_at = monotonic()

    def log_if_due(line: str) -> None:
        nonlocal logged_at
        if (now := monotonic()) - logged_at >= INTERVAL_S:
            log(line)
            logged_at = now

    return log_if_due
