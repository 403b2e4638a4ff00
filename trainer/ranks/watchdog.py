"""The watchdog: ends this process when a rank hangs or is gone, or its launcher is, and reports why.

A collective returns when all ranks have entered it, or fails after minutes. So two threads watch the training. One
exchanges heartbeats. The other runs the failure detector, and calls the store only to end the process, so that a store
that does not answer cannot stop it.

It does not notice a GPU kernel that does not end, because NCCL does not watch collectives in a CUDA graph.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress

from trainer.ranks import detector
from trainer.ranks.activity import Activity
from trainer.ranks.failure import FailureContext, FailureLock, write_failure
from trainer.ranks.heartbeat import FRESH_S, Heartbeat, HeartbeatExchange
from trainer.ranks.launcher import LAUNCHER_PID
from trainer.ranks.procfs import has_ended, parent_pid
from trainer.ranks.rendezvous import Store

BEAT_EVERY_S = 0.25
DETECT_EVERY_S = 0.5
LEAVE_S = 3.0
"""Longest time that a store that does not answer keeps a rank from leaving."""
EXIT_S = 9.0
"""Time that a rank has to exit after a signal; then the watchdog ends it."""


class Watchdog:
    """The two threads of one rank. Without `watch_peers`, they only watch the launcher."""

    def __init__(self, context: FailureContext, activity: Activity) -> None:
        self._context = context
        self._activity = activity
        self._lock: FailureLock | None = None
        self._heartbeats: HeartbeatExchange | None = None
        self._exchanging: threading.Thread | None = None
        self._watching: threading.Thread | None = None
        self._follows_launcher = False
        self._beat = 0
        self._stopped = threading.Event()

    @property
    def collective_error(self) -> Exception | None:
        """The exception of the last collective that failed."""
        return self._activity.collective_error

    def watch_launcher(self) -> None:
        """Starts to watch the launcher, which may have died since this process began."""
        self._follows_launcher = True
        self._start_watching()

    def watch_peers(self, store: Store, round_name: str) -> FailureLock:
        """Starts to watch the other ranks; this rank's first heartbeat is in the store when this returns.

        Args:
            store: a connection of its own, because calls on it may block.

        Returns:
            The round's failure lock. The watchdog keeps it informed of who holds it.
        """
        rank, size = self._context.rank, self._context.world_size
        heartbeats, lock = HeartbeatExchange(store, round_name, rank, size), FailureLock(store, round_name, rank)
        heartbeats.exchange(self._heartbeat())
        self._heartbeats, self._lock = heartbeats, lock
        arguments = (heartbeats, lock)
        self._exchanging = threading.Thread(target=self._exchange, args=arguments, name="heartbeats", daemon=True)
        self._exchanging.start()
        self._start_watching()
        return lock

    def stop(self) -> None:
        """Tells the others, if the store still answers, that this rank leaves, and stops watching."""
        self._stopped.set()
        if self._exchanging is not None:
            self._exchanging.join(timeout=LEAVE_S)

    def lost_peers(self) -> list[int]:
        """Returns the ranks that are gone when a collective has failed.

        Ranks of this launcher are gone when their process has ended, others when they send no more heartbeats. Once the
        store is gone, ranks that have ended may only have noticed before this one.
        """
        deadline = time.monotonic() + detector.STALE_AFTER_S
        while self._heartbeats and time.monotonic() < deadline and not self._stopped.wait(BEAT_EVERY_S):
            if self._heartbeats.age_s > FRESH_S:
                continue
            peers = self._heartbeats.peers
            ended = [rank for rank, peer in peers.items() if _is_sibling(peer) and has_ended(peer.pid)]
            lost = ended or self._heartbeats.silent(detector.STALE_AFTER_S)
            if lost:
                return sorted(lost)
        return []

    def describe(self, ranks: Sequence[int]) -> str:
        """Returns the ranks with their processes and hosts, as far as heartbeats have named them."""
        return detector.describe_ranks(ranks, self._peers)

    def describe_wait(self) -> str:
        """Returns which ranks this one waits for in its collective; "" if a lower rank waits and tells the user."""
        return detector.describe_wait(self._context.rank, self._context.world_size, self._heartbeat(), self._peers)

    @property
    def _peers(self) -> dict[int, Heartbeat]:
        return self._heartbeats.peers if self._heartbeats else {}

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            beat=self._beat,
            num_collectives=self._activity.num_collectives,
            waited_s=self._activity.waited_s,
            timeout_s=self._activity.timeout_s,
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

    def _start_watching(self) -> None:
        if self._watching is None:
            self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._watching.start()

    def _watch(self) -> None:
        while not self._stopped.wait(DETECT_EVERY_S):
            if self._follows_launcher and os.getppid() != LAUNCHER_PID:
                self._follow_launcher()
            self._activity.idle_clock.sample()
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
        activity = self._activity
        suspicion = detector.suspect_self(observed, idle_s=activity.idle_s, idle_timeout_s=activity.hang_timeout_s)
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
