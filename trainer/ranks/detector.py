"""The failure detector: decides from the heartbeats which rank hangs, is gone or is late.

A rank hangs if it has entered fewer collectives than a rank that has waited for longer than the timeout. If it can, it
suspects itself first, because it knows the stack that it hangs in; the others name it `GRACE_S` later. The timeout
depends on the phase: a download or a first step may take minutes, but a process that should compute must not be idle. A
rank that sends no heartbeats is gone, whatever its phase.

Starts no threads, makes no calls to the store.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trainer.ranks.heartbeat import Heartbeat

SILENT_AFTER_S = 7.0
"""A rank that has sent no heartbeat for this long is gone, or its host is."""
STALE_AFTER_S = 4.0
"""The same if others wait for it."""
STORE_TIMEOUT_S = 4.0
"""A store that has not answered for this long does not answer any more."""
MAX_NAMED = 8
"""Ranks or hosts that a line for the user names."""
GRACE_S = 1.5
"""Delay after which the others name a rank that has not named itself."""


class Suspicion(NamedTuple):
    """A failure, and the ranks that are at fault; none if they are unknown."""

    ranks: list[int]
    message: str


class RankObservations(NamedTuple):
    """One rank's heartbeat, the heartbeats that it has received, and their age.

    Args:
        rank: the rank that observes.
        own: its own heartbeat.
        peers: the last heartbeats of the others.
        silent: the others that have sent none for `SILENT_AFTER_S`.
        stale: the others that have sent none for `STALE_AFTER_S`.
        store_age_s: seconds since the store answered.
    """

    rank: int
    own: Heartbeat
    peers: Mapping[int, Heartbeat]
    silent: Sequence[int]
    stale: Sequence[int]
    store_age_s: float


def suspect_self(observed: RankObservations, *, idle_s: float, idle_timeout_s: float) -> Suspicion | None:
    """Returns the suspicion that this rank hangs, or None.

    Args:
        idle_s: seconds for which this process has been idle in compute-only code.
        idle_timeout_s: seconds for which it may be idle while others wait for it.
    """
    own = observed.own
    if own.waited_s is not None:
        return None
    for peer in observed.peers.values():
        waited_s = peer.waited_s or 0.0 if peer.num_collectives > own.num_collectives else 0.0
        if waited_s > max(peer.timeout_s, own.timeout_s) or min(waited_s, idle_s) > idle_timeout_s:
            return Suspicion(
                [observed.rank], f"rank {observed.rank} hangs: the others have waited {waited_s:.0f} s for it"
            )
    return None


def suspect_peers(observed: RankObservations) -> Suspicion | None:
    """Returns the suspicion that another rank hangs or is gone, or that the network is cut; else None."""
    own, waited_s = observed.own, observed.own.waited_s
    if observed.silent:
        return _suspicion(observed, observed.silent, f"sent no heartbeat for {SILENT_AFTER_S:.0f} s")
    if waited_s is None or waited_s < own.timeout_s + GRACE_S:
        return None
    if observed.store_age_s > STORE_TIMEOUT_S:
        name = describe(observed.rank, own)
        return Suspicion([], f"{name} has waited {waited_s:.0f} s, and the run's store does not answer")
    if observed.stale:
        what = f"sent no heartbeat for {STALE_AFTER_S:.0f} s, and the others wait for it"
        return _suspicion(observed, observed.stale, what)
    late = [rank for rank, peer in observed.peers.items() if peer.num_collectives < own.num_collectives]
    if late and all(waited_s > observed.peers[rank].timeout_s + GRACE_S for rank in late):
        what = f"has not joined the collective in which the others have waited for {waited_s:.0f} s"
        return _suspicion(observed, late, what)
    if not late and waited_s > own.timeout_s + 2 * GRACE_S:
        return Suspicion([], f"all ranks have waited {waited_s:.0f} s for each other: the network may be cut")
    return None


def describe(rank: int, heartbeat: Heartbeat | None) -> str:
    """Returns `rank 2 (process 123 on host x)`."""
    return f"rank {rank} (process {heartbeat.pid} on {heartbeat.host})" if heartbeat else f"rank {rank}"


def describe_ranks(ranks: Sequence[int], peers: Mapping[int, Heartbeat]) -> str:
    """Returns the first of these ranks with their processes and hosts, and the number of the others."""
    names = [describe(rank, peers.get(rank)) for rank in ranks[:MAX_NAMED]]
    more = [f"{len(ranks) - MAX_NAMED} more"] if len(ranks) > MAX_NAMED else []
    return " and ".join([*names, *more])


def describe_wait(rank: int, size: int, own: Heartbeat, peers: Mapping[int, Heartbeat]) -> str:
    """Returns which ranks this one waits for in its collective; "" if a lower rank waits and tells the user.

    Args:
        own: this rank's heartbeat; `peers` has those of the others, by rank.
    """
    entered = {other for other, peer in peers.items() if peer.num_collectives >= own.num_collectives}
    if min(entered, default=size) < rank:
        return ""
    if late := [other for other in range(size) if other not in entered | {rank}]:
        return f"rank {rank} waits for {describe_ranks(late, peers)}"
    hosts = sorted({heartbeat.host for heartbeat in (own, *peers.values())})
    return f"all {size} ranks wait for their connections to each other, on {', '.join(hosts[:MAX_NAMED])}"


def _suspicion(observed: RankObservations, ranks: Sequence[int], what: str) -> Suspicion:
    return Suspicion(list(ranks), f"{describe_ranks(ranks, observed.peers)} {what}")
