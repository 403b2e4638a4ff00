"""Whose failure it is, and what is left of it for people: one voice on the terminal, one `failure.json`.

When a rank fails, the others fail a moment later for want of it. The first to claim the failure in the store of the
run speaks and writes; the others leave without a word.
"""

import contextlib
import datetime
import os
import socket
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from trainer.files import write_json
from trainer.ranks.rendezvous import Store

FAILURE_FILE = "failure.json"


@dataclass(slots=True, kw_only=True)
class FailureContext:
    """What a failure report should say besides the failure. Kept up to date by who knows.

    Args:
        folder: of the run; None until it is known and entered, and until then no report is written.
        step: steps done.
    """

    rank: int = 0
    world_size: int = 1
    folder: Path | None = None
    step: int = 0
    attempt: int = field(default_factory=lambda: int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def write_failure(
    failure_context: FailureContext, message: str, *, kind: str, trace: str | None, ranks: list[int]
) -> None:
    """Write `failure.json` into the run folder, over the one of an earlier failure.

    Args:
        message: what the user sees.
        kind: the error's class.
        trace: the stack of the rank that failed, where it is known.
        ranks: whom the failure is laid to.
    """
    if failure_context.folder is None:
        return
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
        "ranks": ranks,
        "error": kind,
        "message": message,
        "traceback": trace,
        "told_by": {"rank": failure_context.rank, "host": socket.gethostname(), "pid": os.getpid()},
        "world_size": failure_context.world_size,
        "attempt": failure_context.attempt,
        "step": failure_context.step,
    }
    with contextlib.suppress(OSError):  # the disk may be what failed, and the terminal has it
        write_json(failure_context.folder / FAILURE_FILE, record)


def write_error(failure_context: FailureContext, error: Exception, ranks: list[int]) -> None:
    """The same for an exception of this rank."""
    trace = "".join(traceback.format_exception(error))
    write_failure(failure_context, str(error), kind=type(error).__name__, trace=trace, ranks=ranks)


class FailureLock:
    """The right to speak about the failure of a round, which one rank gets.

    Args:
        name: the round's.
    """

    def __init__(self, store: Store, name: str, rank: int) -> None:
        self._store = store
        self._key = f"convoy/failure/{name}"
        self._rank = rank

    def acquire(self) -> int:
        """Acquires the lock, and returns the rank that holds it; this rank where the store is gone."""
        try:
            return int(self._store.compare_set(self._key, "", str(self._rank)))
        except (RuntimeError, ValueError):  # the launcher, and the store in it, is gone
            return self._rank

    def holder(self) -> int | None:
        """The rank that has it, if any.

        Raises:
            RuntimeError: the store is gone.
        """
        return int(self._store.get(self._key)) if self._store.check([self._key]) else None
