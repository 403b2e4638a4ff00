"""Tells the user what a long export is doing."""

from collections.abc import Callable
from time import monotonic

INTERVAL_S = 5.0
Show = Callable[[str], None]
"""Shows a line, or leaves it out because the last one is recent."""


def show_stages(log: Callable[[str], None]) -> Show:
    """Returns a function that prints the line it is given, unless one was printed in the last `INTERVAL_S`."""
    shown_at = monotonic()

    def show(line: str) -> None:
        nonlocal shown_at
        if (now := monotonic()) - shown_at >= INTERVAL_S:
            log(line)
            shown_at = now

    return show
