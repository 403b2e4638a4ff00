"""Reports a failure once, on the terminal and in `failure.json`: the rank that fails first does.

When a rank fails, the others fail a moment later, because they lose their peer. The first rank that acquires the
failure lock in the run's store reports; the others exit without a message. See docs/decisions/0004-one-report.md.
"""

import contextlib
import datetime
import os
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from convoy.processes import ignore_signals
from trainer.errors import DesyncError, MismatchError, PeerError, TrainerError, first_line
from trainer.files import write_json
from trainer.paths import FAILURE_FILE
from trainer.ranks.rendezvous import Store

LOCK_WAIT_S = 1.0
"""A rank that has only lost a peer waits this long for a rank that reports why; if none does, the peer was killed."""
NOTICE_S = 0.5
"""A rank that holds the lock stays this long, until the others know: the store may end with this rank's launcher."""


@dataclass(slots=True, kw_only=True)
class FailureContext:
    """The context of a failure report, kept up to date during the run.

    Args:
        folder: of the run; None, and then no report is written, until this rank has entered it.
        step: steps done.
        attempt: number of times that torchrun has restarted the ranks.
    """

    rank: int = 0
    world_size: int = 1
    folder: Path | None = None
    step: int = 0
    attempt: int = 0


class FailureLock:
    """A lock in the store that one rank of a round acquires when the round fails, and never releases."""

    def __init__(self, store: Store, round_name: str, rank: int) -> None:
        self._store = store
        self._key = f"convoy/failure/{round_name}"
        self._rank = rank
        self._holder: int | None = None

    def acquire(self) -> int:
        """Acquires the lock if it is free.

        Returns:
            The rank that holds it. If the store is gone: the one that was known to hold it, else this rank.
        """
        if self._holder is None:
            try:
                self._holder = int(self._store.compare_set(self._key, "", str(self._rank)))
            except (RuntimeError, ValueError):  # the launcher, which has the store, is gone
                self._holder = self._rank
        return self._holder

    def holder(self) -> int | None:
        """Returns the rank that holds the lock; None while it is free.

        Raises:
            RuntimeError: the store is gone.
        """
        if self._holder is None and self._store.check([self._key]):
            self._holder = int(self._store.get(self._key))
        return self._holder


class PeerMonitor(Protocol):
    """The part of the watchdog that a failure report needs."""

    @property
    def collective_error(self) -> Exception | None: ...
    def lost_peers(self) -> list[int]: ...
    def describe(self, ranks: Sequence[int]) -> str: ...


def write_failure(context: FailureContext, message: str, *, kind: str, trace: str | None, ranks: list[int]) -> None:
    """Writes `failure.json` into the run folder, and replaces that of an earlier failure.

    Args:
        message: the line that the user sees.
        kind: the class of the error.
        trace: the stack of the rank that failed, if known.
        ranks: the ranks at fault.
    """
    if context.folder is None:
        return
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
        "ranks": ranks,
        "error": kind,
        "message": message,
        "traceback": trace,
        "told_by": {"rank": context.rank, "host": socket.gethostname(), "pid": os.getpid()},
        "world_size": context.world_size,
        "attempt": context.attempt,
        "step": context.step,
    }
    with contextlib.suppress(OSError):  # the disk may be what failed, and the terminal shows the message
        write_json(context.folder / FAILURE_FILE, record)


def write_error(context: FailureContext, error: Exception, ranks: list[int]) -> None:
    """Writes `failure.json` for an exception of this rank."""
    trace = "".join(traceback.format_exception(error))
    write_failure(context, str(error), kind=type(error).__name__, trace=trace, ranks=ranks)


@contextmanager
def report_failure(context: FailureContext, lock: FailureLock | None, peers: PeerMonitor) -> Iterator[None]:
    """Context for a rank's whole part in a run: writes the report of an exception, if this rank is to report it.

    Args:
        lock: None for a single rank.

    Raises:
        PeerError: instead of the exception, if another rank reports.
        TrainerError: instead of a lost connection, if another rank was killed and this one is the first to notice.
    """
    try:
        yield
    except Exception as error:
        # torchrun ends all ranks when one has exited: none may do so before it has told the user.
        with ignore_signals(for_good=lock is not None), _noticed(lock, context.rank):
            if lock is not None:
                _acquire_or_leave(error, context, lock, peers)
            ranks = error.ranks if isinstance(error, DesyncError | MismatchError) else [context.rank]
            write_error(context, error, ranks)
        raise
    except BaseException:  # a signal is no failure: the lock keeps the others from reporting a lost rank
        with _noticed(lock, context.rank):
            raise


@contextmanager
def _noticed(lock: FailureLock | None, rank: int) -> Iterator[None]:
    """Context of the end of a rank: if it holds the lock, it stays until the others know."""
    try:
        yield
    finally:
        if lock is not None and lock.acquire() == rank:
            time.sleep(NOTICE_S)


def _acquire_or_leave(error: Exception, context: FailureContext, lock: FailureLock, peers: PeerMonitor) -> None:
    """Returns if this rank is to report its own error.

    Raises:
        PeerError: another rank reports.
        TrainerError: another rank was killed, and this one reports that.
    """
    has_lost_peer = _is_lost_connection(error, in_collective=error is peers.collective_error)
    if has_lost_peer and _is_acquired(lock, within_s=LOCK_WAIT_S):
        raise PeerError("another rank failed first") from None
    lost = peers.lost_peers() if has_lost_peer else []
    holder = lock.acquire()
    if holder != context.rank:
        raise PeerError(f"rank {holder} failed first") from None
    if has_lost_peer:
        what = first_line(error).partition(". ")[0]  # without the advice that Gloo and NCCL add
        names, cause = (f": {peers.describe(lost)}", "") if lost else ("", f" ({what})")
        message = (
            f"rank {context.rank} lost another rank{names}, which was killed or whose host is gone; "
            f"the run can continue from its last checkpoint{cause}"
        )
        trace = "".join(traceback.format_exception(error))
        write_failure(context, message, kind="LostRank", trace=trace, ranks=lost)
        raise TrainerError(message) from None


def _is_acquired(lock: FailureLock, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if lock.holder() is not None:
                return True
        except (RuntimeError, ValueError):
            return False
        time.sleep(0.05)
    return False


def _is_lost_connection(error: Exception, *, in_collective: bool) -> bool:
    """Returns whether a healthy rank gets this error when a peer is gone.

    Only ranks are connected by NCCL and Gloo, which may report a lost peer later, where the code waits for something
    else. Outside of collectives, other lost connections are not connections between ranks.
    """
    message = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, dist.DistError) or "NCCL" in message or "gloo/transport" in message:
        return True
    is_lost = "gloo" in message or "Connection" in message
    return in_collective and (is_lost or isinstance(error, ConnectionError))
