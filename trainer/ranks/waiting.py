"""Tells the user which process this one waits for, if a wait takes longer than a few seconds."""

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

FIRST_S = 5.0
"""A wait is announced after this long, and again after twice, four times, eight times as long."""


@contextmanager
def announced(describe: Callable[[], str]) -> Iterator[None]:
    """Context for code that waits for another process, also in a call that blocks its thread in C.

    Args:
        describe: returns a description of the wait, or "" if another process tells the user. A thread calls it.
    """
    ended = threading.Event()
    threading.Thread(target=_announce, args=(describe, ended), name="waiting", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _announce(describe: Callable[[], str], ended: threading.Event) -> None:
    began, pause_s = time.monotonic(), FIRST_S
    while not ended.wait(pause_s):
        text = ""
        with suppress(RuntimeError):  # a store that does not answer
            text = describe()
        if text and not ended.is_set():
            with suppress(OSError):  # the reader of the output may be gone
                print(f"{text} ({time.monotonic() - began:.0f} s so far)", file=sys.stderr, flush=True)
        pause_s *= 2


def name_numbers(kind: str, numbers: Sequence[int]) -> str:
    """Returns `rank 3`, or `ranks 1, 4 to 7`.

    Args:
        numbers: in ascending order.
    """
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):  # numbers without a gap
        found = [number for _, number in run]
        parts += [f"{found[0]} to {found[-1]}"] if len(found) > 2 else map(str, found)
    return f"{kind}{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"
