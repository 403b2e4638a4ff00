"""Who is in this round: ranks that start together find each other in a store that outlives them.

torchrun keeps one store while it starts the ranks again and again (after a failure, when a host joins or leaves), and
what earlier ranks left there looks like an answer: torch's own keys too, which then point at sockets of the dead. So
rank 0 gives each round a name that nobody has used, and the ranks put all their keys under it.
"""

import time
import uuid
from typing import Protocol


class Store(Protocol):
    """What of torch's TCPStore is used here and in `failure` and `watchdog`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str]) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


def rendezvous(store: Store, rank: int, size: int) -> str:
    """The name of this round, the same on every rank; returns when all ranks are there.

    Each rank says hello with a name of its own; rank 0 answers to every hello that it has not seen, and waits until the
    ranks that were answered by *it* have said so. A hello of a dead rank is answered too, and nobody hears that.

    Raises:
        RuntimeError: the store is gone, or ranks are missing for longer than its time-out.
    """
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f"convoy/hello/{rank}", me)
        store.wait([f"convoy/welcome/{me}"])
        name = store.get(f"convoy/welcome/{me}").decode()
        store.set(f"convoy/here/{name}/{rank}", "")
        store.wait([f"convoy/go/{name}"])
        return name
    answered: dict[int, str] = {}
    missing = list(range(1, size))
    while missing:
        for other in missing:
            if not store.check([f"convoy/hello/{other}"]):
                continue
            hello = store.get(f"convoy/hello/{other}").decode()
            if answered.get(other) != hello:
                store.set(f"convoy/welcome/{hello}", me)
                answered[other] = hello
        missing = [other for other in missing if not store.check([f"convoy/here/{me}/{other}"])]
        time.sleep(0.01)
    store.set(f"convoy/go/{me}", "")
    return me
