"""The watchdog: ends this process when a rank hangs or is gone, or its launcher is, and reports why.

A collective returns when all ranks have entered it, or fails after minutes. So two threads watch the training. One
exchanges heartbeats. The other runs the failure detector, and calls the store only to end the process, so that a store
that does not answer cannot stop it.

It does not notice a GPU kernel that does not end, because NCCL does not watch collectives in a CUDA graph.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from trainer.ranks import detector
from trainer.ranks.failure import FailureContext, FailureLock, write_failure
from trainer.ranks.heartbeat import Heartbeat, HeartbeatExchange
from trainer.ranks.launcher import LAUNCHER_PID
from trainer.ranks.procfs import IdleClock, has_ended, parent_pid
from trainer.ranks.rendezvous import Store

BEAT_EVERY_S = 0.25
DETECT_EVERY_S = 0.5
HANG_TIMEOUT_S = 5.0
"""Least time that ranks wait for one between training steps, and longest time that one that computes may be idle."""
SLOW_PHASE_TIMEOUT_S = 600.0
"""Time that ranks wait for one that fetches data, writes a report or runs its first step."""
LEAVE_S = 3.0
"""Longest time that a store that does not answer keeps a rank from leaving."""
MOST_NAMED = 8
"""Ranks or hosts that a line for the user names."""
EXIT_S = 9.0
"""Time that a rank has to exit after a signal; then the watchdog ends it."""


class Watchdog:
    """The two threads of one rank. Without `watch_peers`, only the launcher is watched.

    Args:
        hang_timeout_s: see `HANG_TIMEOUT_S`; 0 for never, so that a debugger may stop a rank.
    """

    def __init__(self, context: FailureContext, hang_timeout_s: float = HANG_TIMEOUT_S) -> None:
        self._context = context
        self._hang_timeout_s = hang_timeout_s if hang_timeout_s > 0 else math.inf
        self._lock: FailureLock | None = None
        self._heartbeats: HeartbeatExchange | None = None
        self._exchanging: threading.Thread | None = None
        self._num_collectives, self._beat = 0, 0
        self._waiting_since: float | None = None
        self._stopped = threading.Event()
        self._is_computing = False
        self._idle_clock = IdleClock()
        self.timeout_s = SLOW_PHASE_TIMEOUT_S
        self.collective_error: Exception | None = None
        """The exception of the last collective that failed."""

    @property
    def timeout_s(self) -> float:
        """Seconds that others may wait for this rank in a collective, and that it waits for them."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._timeout_s = max(seconds, self._hang_timeout_s)
        self._timeout_after_collective_s: float | None = None

    def watch_launcher(self) -> None:
        """Starts to watch the launcher, which may have died since this process began."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def watch_peers(self, store: Store, round_name: str) -> None:
        """Starts to watch the other ranks; this rank's first heartbeat is in the store when this returns.

        Args:
            store: a connection of its own, because calls on it may block.
        """
        rank, size = self._context.rank, self._context.world_size
        heartbeats, lock = HeartbeatExchange(store, round_name, rank, size), FailureLock(store, round_name, rank)
        heartbeats.exchange(self._heartbeat())
        self._heartbeats, self._lock = heartbeats, lock
        arguments = (heartbeats, lock)
        self._exchanging = threading.Thread(target=self._exchange, args=arguments, name="heartbeats", daemon=True)
        self._exchanging.start()

    def stop(self) -> None:
        """Tells the others, if the store still answers, that this rank leaves, and stops watching."""
        self._stopped.set()
        if self._exchanging is not None:
            self._exchanging.join(timeout=LEAVE_S)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Context for every collective."""
        self._num_collectives += 1
        self._waiting_since = time.monotonic()
        try:
            yield
        except Exception as error:
            self.collective_error = error
            raise
        finally:
            self._waiting_since = None
            if self._timeout_after_collective_s is not None:
                self.timeout_s = self._timeout_after_collective_s

    @contextmanager
    def slow_phase(self) -> Iterator[None]:
        """Context for work that one rank does while the others wait for it, for up to `SLOW_PHASE_TIMEOUT_S`.

        The old timeout is back after the next collective, when the others have certainly received the longer one.
        """
        before = self._timeout_after_collective_s or self.timeout_s
        self.timeout_s = SLOW_PHASE_TIMEOUT_S
        is_computing, self._is_computing = self._is_computing, False
        try:
            yield
        finally:
            self._idle_clock.reset()
            self._timeout_after_collective_s, self._is_computing = before, is_computing

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context for compute-only code: an idle process counts as hung, however long the others would wait."""
        is_computing, self._is_computing = self._is_computing, True
        self._idle_clock.reset()
        try:
            yield
        finally:
            self._is_computing = is_computing

    def lost_peers(self) -> dict[int, str]:
        """Returns the ranks that are gone, and a description of each, when a collective has failed.

        Ranks of this launcher are gone when their process has ended, others when they send no more heartbeats.
        """
        deadline = time.monotonic() + detector.STALE_AFTER_S
        while self._heartbeats and time.monotonic() < deadline and not self._stopped.wait(BEAT_EVERY_S):
            peers = self._heartbeats.peers
            ended = [rank for rank, peer in peers.items() if _is_sibling(peer) and has_ended(peer.pid)]
            lost = ended or self._heartbeats.silent(detector.STALE_AFTER_S)
            if lost:
                return {rank: detector.describe(rank, peers.get(rank)) for rank in sorted(lost)}
        return {}

    def describe(self, ranks: Sequence[int]) -> str:
        """Returns the ranks with their processes and hosts, as far as heartbeats have named them."""
        peers = self._heartbeats.peers if self._heartbeats else {}
        names = [detector.describe(rank, peers.get(rank)) for rank in ranks[:MOST_NAMED]]
        more = [f"{len(ranks) - MOST_NAMED} more"] if len(ranks) > MOST_NAMED else []
        return " and ".join([*names, *more])

    def describe_wait(self) -> str:
        """Returns which ranks this one waits for in its collective; "" if a lower rank waits and tells the user."""
        peers = self._heartbeats.peers if self._heartbeats else {}
        rank, size = self._context.rank, self._context.world_size
        late = [other for other in range(size) if other != rank and not self._has_entered(peers.get(other))]
        if any(other < rank and other not in late for other in range(size)):
            return ""
        if late:
            return f"rank {rank} waits for {self.describe(late)}"
        hosts = sorted({peer.host for peer in peers.values()} | {socket.gethostname()})
        return f"all {size} ranks wait for their connections to each other, on {', '.join(hosts[:MOST_NAMED])}"

    def _has_entered(self, peer: Heartbeat | None) -> bool:
        return peer is not None and peer.num_collectives >= self._num_collectives

    def _heartbeat(self) -> Heartbeat:
        since = self._waiting_since
        return Heartbeat(
            beat=self._beat,
            num_collectives=self._num_collectives,
            waited_s=None if since is None else time.monotonic() - since,
            timeout_s=self.timeout_s,
            pid=os.getpid(),
            launcher_pid=LAUNCHER_PID,
            host=socket.gethostname(),
        )

    def _exchange(self, heartbeats: HeartbeatExchange, lock: FailureLock) -> None:
        while not self._stopped.wait(BEAT_EVERY_S):
            self._beat += 1
            try:
                heartbeats.exchange(self._heartbeat())
                has_failed = lock.holder() not in (None, self._context.rank)
            except (RuntimeError, ValueError):
                continue
            if has_failed and not self._stopped.wait(2 * detector.GRACE_S):
                os._exit(1)
        with suppress(RuntimeError):
            heartbeats.leave()

    def _watch(self) -> None:
        while not self._stopped.wait(DETECT_EVERY_S):
            if os.getppid() != LAUNCHER_PID:
                self._follow_launcher()
            self._idle_clock.sample()
            if self._heartbeats is not None and self._lock is not None:
                self._detect(self._heartbeats, self._lock)

    def _detect(self, heartbeats: HeartbeatExchange, lock: FailureLock) -> None:
        observed = detector.RankObservations(
            rank=self._context.rank,
            own=self._heartbeat(),
            peers=heartbeats.peers,
            silent=heartbeats.silent(detector.SILENT_AFTER_S),
            stale=heartbeats.silent(detector.STALE_AFTER_S),
            store_age_s=heartbeats.age_s,
        )
        idle_s = self._idle_clock.idle_s if self._is_computing else 0.0
        suspicion = detector.suspect_self(observed, idle_s=idle_s, idle_timeout_s=self._hang_timeout_s)
        trace = _stack_of_main_thread() if suspicion else None
        suspicion = suspicion or detector.suspect_peers(observed)
        if suspicion is None:
            return
        if observed.store_age_s > detector.STORE_TIMEOUT_S or lock.acquire() == observed.rank:
            self._report(suspicion, trace)
            _kill_siblings(observed.peers[rank] for rank in suspicion.ranks if rank in observed.peers)
        else:
            time.sleep(detector.GRACE_S)  # leaves the holder of the lock time to report
        os._exit(1)  # from this thread, as the main thread may hang

    def _follow_launcher(self) -> None:
        """Ends this rank as SIGTERM does, because without its launcher nothing can restart or stop it."""
        _print_error("torchrun is gone; this rank saves and exits")
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._stopped.wait(EXIT_S):
            os._exit(128 + signal.SIGTERM)

    def _report(self, suspicion: detector.Suspicion, trace: str | None) -> None:
        message = f"{suspicion.message}; the run can continue from its last checkpoint"
        write_failure(self._context, message, kind="Hang", trace=trace, ranks=suspicion.ranks)
        _print_error(message + (f"\n{trace}" if trace else ""))


def _kill_siblings(peers: Iterable[Heartbeat]) -> None:
    """Kills ranks of this launcher: torchrun's SIGTERM does not reach one that hangs, and SIGKILL comes 30 s later."""
    for peer in peers:
        if _is_sibling(peer) and parent_pid(peer.pid) == LAUNCHER_PID:  # else another process has its pid now
            with suppress(ProcessLookupError):
                os.kill(peer.pid, signal.SIGKILL)


def _is_sibling(peer: Heartbeat) -> bool:
    return peer.host == socket.gethostname() and peer.launcher_pid == LAUNCHER_PID and peer.pid != os.getpid()


def _stack_of_main_thread() -> str | None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else None


def _print_error(message: str) -> None:
    with suppress(OSError):  # the reader of the output may be gone, and this thread must continue
        print(f"error: {message}", file=sys.stderr, flush=True)
