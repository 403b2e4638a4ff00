"""Agreement of the ranks that start together on a name for their round.

torchrun keeps one store while it restarts the ranks again and again: after a failure, and when a host joins or leaves.
Keys of earlier rounds stay in it, torch's own too, and those name sockets of processes that have ended. So rank 0 gives
each round a new name, and the ranks prefix all their keys with it.
"""

import time
import uuid
from typing import Protocol

POLL_EVERY_S = 0.01


class Store(Protocol):
    """The methods of torch's TCPStore that `failure`, `heartbeat` and this module use."""

    def set(self, key: str, value: str | bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str]) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


def heartbeat_key(round_name: str, rank: int) -> str:
    """Returns the store key of a rank's heartbeat, which exists, with an empty value, after `rendezvous`."""
    return f"convoy/heartbeat/{round_name}/{rank}"


def table_key(round_name: str) -> str:
    """Returns the store key of the table of all heartbeats, which exists, with an empty value, after `rendezvous`."""
    return f"convoy/heartbeat/{round_name}/all"


def rendezvous(store: Store, rank: int, size: int) -> str:
    """Waits for all ranks and returns the name of the round, the same on every rank.

    Each rank except 0 writes a fresh id to `convoy/hello/<rank>`. Rank 0 answers every id with the round's name, in
    `convoy/welcome/<id>`; the rank confirms by creating its heartbeat key. When all have confirmed, rank 0 creates
    `convoy/go/<name>`. Rank 0 also answers the id of a dead rank, which nobody confirms.

    Raises:
        RuntimeError: the store is gone, or ranks are missing for longer than its timeout.
    """
    my_id = uuid.uuid4().hex
    if rank > 0:
        store.set(f"convoy/hello/{rank}", my_id)
        store.wait([f"convoy/welcome/{my_id}"])
        round_name = store.get(f"convoy/welcome/{my_id}").decode()
        store.set(heartbeat_key(round_name, rank), "")
        store.wait([f"convoy/go/{round_name}"])
        return round_name
    round_name = my_id
    answered: dict[int, str] = {}
    missing = list(range(1, size))
    while missing:
        for other in missing:
            if not store.check([f"convoy/hello/{other}"]):
                continue
            other_id = store.get(f"convoy/hello/{other}").decode()
            if answered.get(other) != other_id:
                store.set(f"convoy/welcome/{other_id}", round_name)
                answered[other] = other_id
        missing = [other for other in missing if not store.check([heartbeat_key(round_name, other)])]
        time.sleep(POLL_EVERY_S)
    for key in (heartbeat_key(round_name, 0), table_key(round_name)):
        store.set(key, "")
    store.set(f"convoy/go/{round_name}", "")
    return round_name
