"""Spares Python's garbage collector searches that find nothing.

The collector looks through all objects again and again while their number grows, and that grows by half a million when
torch and what it brings are imported: an eighth of the processor time of these imports, a quarter with its compiler.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Context in which cycles of objects are not searched for; for work that is soon over."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Context for imports of large packages: their objects live as long as the process, and are never looked through.

    What is garbage at its end stays.
    """
    with paused_collector():
        yield
        gc.freeze()
