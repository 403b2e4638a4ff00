"""Heartbeats: what the ranks know about each other, and what that costs the store."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from trainer.ranks import watchdog
from trainer.ranks.activity import Activity
from trainer.ranks.failure import FailureContext
from trainer.ranks.heartbeat import Heartbeat, HeartbeatExchange
from trainer.ranks.rendezvous import heartbeat_key, table_key
from trainer.ranks.watchdog import Watchdog


class CountingStore:
    """A connection to the store that counts calls and bytes of values."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()
        self.num_bytes = 0

    def set(self, key: str, value: str | bytes) -> None:
        self.calls["set"] += 1
        self.num_bytes += len(value)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        return self._received("get", [self._store.get(key)])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._received("multi_get", self._store.multi_get(keys))

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        return self._store.check(keys)

    def wait(self, keys: list[str]) -> None:
        raise AssertionError("nobody waits for a heartbeat")

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        raise AssertionError("nobody has failed")

    def _received(self, call: str, values: list[bytes]) -> list[bytes]:
        self.calls[call] += 1
        self.num_bytes += sum(map(len, values))
        return values


@pytest.fixture(scope="module")
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def create_keys(server: dist.TCPStore, name: str, size: int) -> None:
    """Does what `rendezvous` does."""
    for key in (*(heartbeat_key(name, rank) for rank in range(size)), table_key(name)):
        server.set(key, "")


def state(beat: int, num_collectives: int = 0) -> Heartbeat:
    return Heartbeat(beat, num_collectives, None, 5.0, pid=1, launcher_pid=1, host="host")


class Ranks:
    """The exchanges of all ranks of a round, on a clock that the test advances."""

    def __init__(self, server: dist.TCPStore, name: str, size: int) -> None:
        self.now = 0.0
        create_keys(server, name, size)
        clock = lambda: self.now  # noqa: E731
        self._exchanges = [HeartbeatExchange(server, name, rank, size, clock=clock) for rank in range(size)]
        self._beat = 0
        self.beat(*range(size))
        self.beat(*range(size))

    def __getitem__(self, rank: int) -> HeartbeatExchange:
        return self._exchanges[rank]

    def beat(self, *ranks: int) -> None:
        """Exchanges the heartbeats of these ranks; the monitor, which comes last, already knows the others'."""
        self._beat += 1
        for rank in reversed(ranks):
            self._exchanges[rank].exchange(state(self._beat, num_collectives=rank))
        for rank in ranks:
            self._exchanges[rank].exchange(state(self._beat, num_collectives=rank))


def test_every_rank_knows_the_others(server: dist.TCPStore) -> None:
    ranks = Ranks(server, "known", 3)
    assert ranks[0].peers == {1: state(2, num_collectives=1), 2: state(2, num_collectives=2)}
    assert ranks[1].peers == {0: state(2, num_collectives=0), 2: state(2, num_collectives=2)}


def test_a_rank_that_sends_no_heartbeat_is_silent_and_one_that_left_is_not(server: dist.TCPStore) -> None:
    ranks = Ranks(server, "silent", 4)
    ranks[3].leave()
    for ranks.now in (1.0, 2.0, 3.0):
        ranks.beat(0, 1)
    assert ranks[0].silent(2.5) == ranks[1].silent(2.5) == [2]
    assert ranks[0].silent(3.5) == ranks[1].silent(3.5) == []
    assert (set(ranks[0].peers), set(ranks[1].peers)) == ({1, 2}, {0, 2})


def test_if_the_monitor_is_silent_the_others_suspect_only_the_monitor(server: dist.TCPStore) -> None:
    """Without a new table they get no heartbeats of each other."""
    ranks = Ranks(server, "no monitor", 3)
    for ranks.now in (1.0, 2.0, 3.0):
        ranks.beat(1, 2)
    assert ranks[1].silent(2.5) == ranks[2].silent(2.5) == [0]


def test_the_next_rank_is_the_monitor_when_the_first_has_left(server: dist.TCPStore) -> None:
    ranks = Ranks(server, "next", 3)
    ranks[0].leave()
    ranks.beat(1, 2)
    ranks.beat(1, 2)
    assert ranks[2].peers == {1: state(4, num_collectives=1)}
    assert ranks[1].peers == {2: state(4, num_collectives=2)}


def test_the_last_rank_continues_alone(server: dist.TCPStore) -> None:
    ranks = Ranks(server, "last", 2)
    ranks[0].leave()
    for _ in range(3):
        ranks.beat(1)
    assert ranks[1].peers == {}
    ranks[1].leave()


def test_after_a_pause_of_this_process_the_others_are_not_silent(server: dist.TCPStore) -> None:
    """The whole machine may have been paused."""
    ranks = Ranks(server, "pause", 2)
    ranks.now = 10.0
    assert ranks[0].silent(5.0) == []  # not even the store has answered
    ranks.beat(0)
    assert ranks[0].silent(5.0) == []
    for ranks.now in (11.0, 12.0, 13.0):
        ranks.beat(0)
    assert ranks[0].silent(2.5) == [1]


@contextmanager
def beating(server: dist.TCPStore, size: int) -> Iterator[tuple[list[Watchdog], list[CountingStore]]]:
    """Watchdogs of so many ranks, each with a thread of its own, that only send heartbeats."""
    name = f"{size} ranks"
    create_keys(server, name, size)
    connections = [server.clone() for _ in range(4)]  # a look-up of the host name may make one of them slow
    stores = [CountingStore(connections[rank % 4]) for rank in range(size)]
    watchdogs = [Watchdog(FailureContext(rank=rank, world_size=size), Activity()) for rank in range(size)]
    for each, store in zip(watchdogs, stores, strict=True):
        each.watch_peers(store, name)
    try:
        yield watchdogs, stores
    finally:
        stopping = [threading.Thread(target=each.stop) for each in watchdogs]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()


@pytest.mark.parametrize("size", [4, 64])
def test_the_calls_to_the_store_are_linear_in_the_number_of_ranks(
    size: int, server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 ranks once made 260,000 calls a second; these make 3 a beat each, and the monitor 4."""
    monkeypatch.setattr(watchdog, "BEAT_EVERY_S", 0.1)
    with beating(server, size) as (watchdogs, stores):
        until = time.monotonic() + 60
        while any(len(each._heartbeats.peers) < size - 1 or each._beat < 5 for each in watchdogs if each._heartbeats):
            assert time.monotonic() < until
            time.sleep(0.05)
    for rank, (each, store) in enumerate(zip(watchdogs, stores, strict=True)):
        num_beats = each._beat + 1  # the first is sent before the thread begins
        assert store.calls["check"] == each._beat  # for a failure
        assert store.calls.total() <= 4 * num_beats + 3  # the last: to leave
        if rank == 0:
            assert store.calls["multi_get"] == num_beats + 1
        assert store.num_bytes < 300 * size * num_beats
