"""Heartbeats: four times a second each rank sends the others its state, through the store.

Each rank makes two calls to the store a beat, whatever the number of ranks: it writes its own heartbeat and reads one
table of all. The monitor, the lowest rank that has not left, makes three: it writes its own, reads all in one call, and
writes the table (docs/decisions/0015-heartbeats.md). `detector` decides from the heartbeats which rank has failed.
"""

import json
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

from trainer.ranks.rendezvous import Store, heartbeat_key, table_key

FRESH_S = 2.0
"""After this long without an answer from the store, a rank does not judge the others."""
_GOODBYE = b"goodbye"
"""The last heartbeat of a rank that leaves the run without a failure."""


class Heartbeat(NamedTuple):
    """The state of one rank.

    Args:
        beat: a number that changes with each heartbeat.
        num_collectives: collectives that the rank has entered since the start.
        waited_s: seconds in the collective that it is in; None outside of collectives.
        timeout_s: seconds that others may wait for this rank, and that it waits for them.
        launcher_pid: process id of the torchrun that started it.
    """

    beat: int
    num_collectives: int
    waited_s: float | None
    timeout_s: float
    pid: int
    launcher_pid: int
    host: str


class HeartbeatExchange:
    """One rank's side of the exchange. One thread calls `exchange` and `leave`; others may read.

    Args:
        store: a connection of its own, because calls on it may block.
        round_name: from `rendezvous`, which has created the keys, so that no read waits for one.
    """

    def __init__(
        self, store: Store, round_name: str, rank: int, size: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._clock = clock
        self._rank = rank
        self._table_key = table_key(round_name)
        self._keys = [heartbeat_key(round_name, number) for number in range(size)]
        self._monitor = 0
        self._received: dict[int, tuple[bytes, float]] = {}  # by rank: its last heartbeat, and when it changed
        self._answered_at = self._clock()

    @property
    def age_s(self) -> float:
        """Seconds since the store answered."""
        return self._clock() - self._answered_at

    @property
    def peers(self) -> dict[int, Heartbeat]:
        """The last heartbeats of the other ranks, without those that have left or have not begun."""
        return {rank: Heartbeat(*json.loads(data)) for rank, (data, _) in self._received.items() if data}

    def silent(self, after_s: float) -> list[int]:
        """Returns the ranks that have sent no new heartbeat for so long; only the monitor, if it is one of them."""
        now = self._clock()
        silent = [rank for rank, (_, changed_at) in self._received.items() if now - changed_at > after_s]
        if self.age_s > FRESH_S:  # this rank itself receives nothing
            return []
        return [self._monitor] if self._monitor in silent else silent

    def exchange(self, own: Heartbeat) -> None:
        """Sends this rank's heartbeat and receives the others'.

        Raises:
            RuntimeError: the store is gone.
        """
        self._store.set(self._keys[self._rank], json.dumps(own))
        if self._rank == self._monitor:
            rows = self._publish()
        else:
            table = self._store.get(self._table_key)
            rows = zlib.decompress(table).split(b"\n") if table else [b""] * len(self._keys)
        # After a pause of this process, and perhaps of the whole machine, ages start anew.
        now, before = self._clock(), self._received if self.age_s < FRESH_S else {}
        self._received = {
            rank: before[rank] if rank in before and before[rank][0] == row else (row, now)
            for rank, row in enumerate(rows)
            if rank != self._rank and row != _GOODBYE
        }
        self._monitor = min([self._rank, *self._received])
        self._answered_at = now

    def leave(self) -> None:
        """Tells the others that this rank leaves the run without a failure.

        Raises:
            RuntimeError: the store is gone.
        """
        self._store.set(self._keys[self._rank], _GOODBYE)
        if self._rank == self._monitor:
            self._publish()

    def _publish(self) -> list[bytes]:
        rows = self._store.multi_get(self._keys)
        self._store.set(self._table_key, zlib.compress(b"\n".join(rows)))
        return rows
