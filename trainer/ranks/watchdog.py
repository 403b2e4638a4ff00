"""Signs of life: notices ranks that hang, that are gone, or whose launcher is gone, and ends this process then.

A rank that waits in a collective cannot help itself: the call returns when the others come, or after a time-out of
minutes. So two threads of each rank stand beside the training. One tells the others through the store, twice a second,
how many collectives the rank has entered and how long it has waited in the last one, and reads the same of them. The
other judges, and talks to nobody, so that a store that does not answer cannot stop it.

Who hangs is who has entered fewer collectives than those that wait for it. If it still can, it says so itself, with
the stack that it hangs in. How long is too long depends on what it does: it may take its time over a download, or a
first step that a library prepares, but not stand still where it should compute. Who gives no sign of life is gone,
whatever it was doing. What a GPU computes is not seen here: a kernel that does not end is noticed by nobody, because
NCCL does not watch over collectives in a CUDA graph.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from trainer.ranks.failure import FailureContext, FailureLock, write_failure
from trainer.ranks.launcher import PARENT
from trainer.ranks.rendezvous import Store

BEAT_EVERY_S = 0.5
STALE_AFTER_S = 4.0
"""A rank whose sign of life is older is gone, or its host is, if a training step waits for it."""
SILENT_AFTER_S = 7.0
"""The same of any rank, whatever it was at: its threads must only come to speak."""
PATIENT_S = 600.0
"""How long others may be waited for outside the training steps: one fetches data or writes a report."""
IDLE_AFTER_S = 5.0
"""How long a rank that should compute may stand still, however patient the others are."""
IDLE_SHARE = 0.02
"""What share of a processor is standing still."""
HANG_AFTER_S = 5.0
"""The same between training steps, at least: slow steps need more."""
GRACE_S = 1.5
"""How much later others accuse a rank than it accuses itself, which it does better."""
GOODBYE = "goodbye"
"""Instead of a sign of life, from a rank that has left in good order."""
GOODBYE_S = 3.0
"""How long a store that does not answer may keep a rank from leaving."""
LEAVE_S = 9.0
"""A rank that was asked to leave and has not is ended after this long."""


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """What a rank tells the others.

    Args:
        entered: collectives that it has entered since the start.
        waited: seconds in the one it is in; None between collectives.
        patience: seconds that others may be waited for, and that they should wait for it.
    """

    entered: int
    waited: float | None
    patience: float
    beat: int
    pid: int
    parent: int
    host: str


class Watchdog:
    """The threads of one rank. Until it has met the others, and where there are none, it only minds the launcher."""

    def __init__(self, failure_context: FailureContext) -> None:
        self._situation = failure_context
        self._lock: FailureLock | None = None
        self._keys: list[str] = []
        self._entered, self._since, self._beat = 0, None, 0  # type: tuple[int, float | None, int]
        self._told_at = time.monotonic()
        self._peers: dict[int, Heartbeat] = {}
        self._changed_at: dict[int, float] = {}
        self._parent = PARENT
        self._stopped = threading.Event()
        self._talking: threading.Thread | None = None
        self._is_computing = False
        self._work = _Work()
        self.patience = PATIENT_S
        self.failure: Exception | None = None
        """What the last collective that failed has raised."""

    @property
    def patience(self) -> float:
        """Seconds that others may be waited for, and that they should wait for this rank."""
        return self._patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._patience = seconds
        self._patience_after: float | None = None

    def start(self) -> None:
        """Begin to mind the launcher, which may be gone already: it was there when this process began."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def meet(self, store: Store, name: str) -> None:
        """Begin to mind the other ranks; this rank's first sign of life is in the store when this returns.

        Args:
            store: a connection of its own: a call on it may block.
            name: the round's.
        """
        self._keys = [f"convoy/life/{name}/{rank}" for rank in range(self._situation.world_size)]
        self._tell(store)
        self._told_at = time.monotonic()
        self._lock = FailureLock(store, name, self._situation.rank)
        arguments = (store, self._lock)
        self._talking = threading.Thread(target=self._talk, args=arguments, name="signs-of-life", daemon=True)
        self._talking.start()

    def stop(self) -> None:
        """Say goodbye, if the store still answers, and watch nobody any more."""
        self._stopped.set()
        if self._talking is not None:
            self._talking.join(timeout=GOODBYE_S)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around every collective."""
        self._entered += 1
        self._since = time.monotonic()
        try:
            yield
        except Exception as error:
            self.failure = error
            raise
        finally:
            self._since = None
            if self._patience_after is not None:
                self.patience = self._patience_after

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Around what one rank does while the others go on to wait for it, up to the end of its next collective."""
        before = self.patience if self._patience_after is None else self._patience_after
        self.patience = PATIENT_S
        is_computing, self._is_computing = self._is_computing, False
        try:
            yield
        finally:
            self._work.reset()
            self._patience_after, self._is_computing = before, is_computing  # set back when the others have heard of it

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around what has nothing to wait for but processors: who stands still there hangs, without more patience."""
        is_computing, self._is_computing = self._is_computing, True
        self._work.reset()
        try:
            yield
        finally:
            self._is_computing = is_computing

    def lost_peers(self) -> list[int]:
        """Ranks that are gone: at once where they are this launcher's, else when their signs of life have stopped."""
        deadline = time.monotonic() + STALE_AFTER_S
        while not self._stopped.wait(BEAT_EVERY_S / 2):
            peers = dict(self._peers)
            lost = [rank for rank, life in peers.items() if self._is_sibling(life) and _is_gone(life.pid)]
            lost = lost or [rank for rank in peers if self._is_stale(rank)]
            if lost or time.monotonic() > deadline:
                return sorted(lost)
        return []

    def describe(self, rank: int) -> str:
        """`rank 2 (process 123 on host x)`."""
        life = self._peers.get(rank)
        return f"rank {rank} (process {life.pid} on {life.host})" if life else f"rank {rank}"

    def _life(self) -> Heartbeat:
        since = self._since
        return Heartbeat(
            entered=self._entered,
            waited=None if since is None else time.monotonic() - since,
            patience=self.patience,
            beat=self._beat,
            pid=os.getpid(),
            parent=self._parent,
            host=socket.gethostname(),
        )

    def _tell(self, store: Store) -> None:
        self._beat += 1
        store.set(self._keys[self._situation.rank], json.dumps(asdict(self._life())))

    def _talk(self, store: Store, claim: FailureLock) -> None:
        while not self._stopped.wait(BEAT_EVERY_S):
            try:
                self._tell(store)
                for rank, key in enumerate(self._keys):
                    if rank != self._situation.rank and not self._stopped.is_set() and store.check([key]):
                        self._hear(rank, store.get(key))
                holder = claim.holder()
            except (RuntimeError, ValueError):
                continue
            now = time.monotonic()
            if now - self._told_at > STALE_AFTER_S / 2:  # we stood still ourselves, and perhaps the others with us
                self._changed_at = dict.fromkeys(self._changed_at, now)
            self._told_at = now
            self._work.leave_out_this_thread()
            if holder not in (None, self._situation.rank) and not self._stopped.wait(2 * GRACE_S):
                os._exit(1)
        with suppress(RuntimeError):
            store.set(self._keys[self._situation.rank], GOODBYE)

    def _hear(self, rank: int, said: bytes) -> None:
        if said.decode() == GOODBYE:
            self._peers.pop(rank, None)
            return
        life, known = Heartbeat(**json.loads(said)), self._peers.get(rank)
        if known is None or known.beat != life.beat:
            self._changed_at[rank] = time.monotonic()
        self._peers[rank] = life

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT_EVERY_S):
            if os.getppid() != self._parent:
                self._follow_launcher()
            self._work.look()
            if self._lock is not None:
                self._judge()

    def _follow_launcher(self) -> None:
        """The launcher was killed. Nobody restarts this rank, or stops it: it saves and leaves as for SIGTERM."""
        _say("torchrun is gone; this rank saves and leaves")
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._stopped.wait(LEAVE_S):
            os._exit(128 + signal.SIGTERM)

    def _judge(self) -> None:
        mine, peers = self._life(), dict(self._peers)
        for life in peers.values():
            waited = life.waited if life.entered > mine.entered and mine.waited is None else None
            if waited is not None and waited > max(life.patience, mine.patience):
                self._confess(waited)
            if waited is not None and self._is_computing and min(waited, self._work.idle_s) > IDLE_AFTER_S:
                self._confess(waited)
        silent = sorted(rank for rank in peers if self._is_stale(rank, SILENT_AFTER_S))
        if silent:
            self._accuse(silent, f"gave no sign of life for {SILENT_AFTER_S:.0f} s")
        if mine.waited is None or mine.waited < mine.patience + GRACE_S:
            return
        if time.monotonic() - self._told_at > STALE_AFTER_S:
            self._accuse([], f"has waited {mine.waited:.0f} s, and the store of the run does not answer", claim=False)
        gone = sorted(rank for rank in peers if self._is_stale(rank))
        if gone:
            self._accuse(gone, f"gave no sign of life for {STALE_AFTER_S:.0f} s, and the others wait for it")
        late = [rank for rank, life in peers.items() if life.entered < mine.entered]
        if late and all(mine.waited > peers[rank].patience + GRACE_S for rank in late):
            self._accuse(sorted(late), f"has not come to where the others have waited for {mine.waited:.0f} s")
        if not late and mine.waited > mine.patience + 2 * GRACE_S:
            self._end([], f"all ranks have waited {mine.waited:.0f} s for each other: the network may be cut", None)

    def _confess(self, waited: float) -> NoReturn:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        trace = "".join(traceback.format_stack(frame)) if frame else None
        rank = self._situation.rank
        self._end([rank], f"rank {rank} hangs: the others have waited {waited:.0f} s for it", trace)

    def _accuse(self, ranks: list[int], what: str, *, claim: bool = True) -> NoReturn:
        named = ranks or [self._situation.rank]
        whom = " and ".join(self.describe(rank) for rank in named)
        self._end(ranks, f"{whom} {what}", None, claim=claim)

    def _end(self, ranks: list[int], message: str, trace: str | None, *, claim: bool = True) -> NoReturn:
        """Tell the user, unless another rank does, and end this process, whose main thread cannot."""
        first = self._lock.acquire() if claim and self._lock else self._situation.rank
        if first == self._situation.rank:
            message += "; the run can go on from its last checkpoint"
            write_failure(self._situation, message, kind="Hang", trace=trace, ranks=ranks)
            _say(message + (f"\n{trace}" if trace else ""))
            self._kill_siblings(ranks)
        else:
            time.sleep(GRACE_S)
        os._exit(1)

    def _kill_siblings(self, ranks: list[int]) -> None:
        """torchrun sends SIGTERM, which a rank that hangs does not hear, and waits half a minute before it kills."""
        for rank in ranks:
            life = self._peers.get(rank)
            if life is not None and self._is_sibling(life) and _parent_of(life.pid) == self._parent:
                with suppress(ProcessLookupError):
                    os.kill(life.pid, signal.SIGKILL)

    def _is_sibling(self, life: Heartbeat) -> bool:
        return life.host == socket.gethostname() and life.parent == self._parent and life.pid != os.getpid()

    def _is_stale(self, rank: int, after_s: float = STALE_AFTER_S) -> bool:
        is_heard = time.monotonic() - self._told_at < STALE_AFTER_S / 2
        return is_heard and time.monotonic() - self._changed_at[rank] > after_s


class _Work:
    """Whether this process gets on: it uses a processor, or waits for the disk, as whoever reads mapped data may."""

    def __init__(self) -> None:
        self._told_s: dict[int, float] = {}  # what the watchdog's own threads have used
        self._seen_s, self._seen_at = 0.0, time.monotonic()
        self._worked_at = time.monotonic()

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self._worked_at

    def reset(self) -> None:
        self._worked_at = time.monotonic()

    def leave_out_this_thread(self) -> None:
        """What this thread has used up to now is not work."""
        self._told_s[threading.get_ident()] = time.thread_time()

    def look(self) -> None:
        """To be called now and then."""
        self.leave_out_this_thread()
        used_s, now = time.process_time() - sum(self._told_s.values()), time.monotonic()
        if used_s - self._seen_s > IDLE_SHARE * (now - self._seen_at) or _waits_for_disk():
            self._worked_at = now
        self._seen_s, self._seen_at = used_s, now


def _say(message: str) -> None:
    """Say it where somebody still reads: what was about to end this process must not end the thread instead."""
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def _waits_for_disk() -> bool:
    """Whether the main thread does at this moment."""
    try:
        return _stat(os.getpid())[0] == "D"
    except OSError:
        return False


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that its parent has not yet asked how."""
    try:
        return _stat(pid)[0] in "ZX"
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _parent_of(pid: int) -> int | None:
    """Who started a process; numbers come round again, and only a rank's own number has our launcher here."""
    try:
        return int(_stat(pid)[1])
    except OSError:
        return None


def _stat(pid: int) -> list[str]:
    """State, parent, … of a process, as in proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
