"""The rendezvous: all ranks that start together wait for each other and agree on a name for their round.

torchrun keeps one store while it restarts the ranks again and again: after a failure, and when a host joins or leaves.
Keys of earlier rounds stay in it, torch's own too, and those name sockets of processes that have ended. So rank 0 gives
each round a new name, and the ranks prefix all their keys with it.
"""

import datetime
import time
import uuid
from typing import Any, Protocol

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from trainer.errors import ConfigError, TrainerError, first_line
from trainer.ranks.environment import RankEnvironment
from trainer.ranks.waiting import announced, name_numbers

POLL_EVERY_S = 0.01
JOIN_TIMEOUT_S = 1800.0
"""Longest wait for ranks that have not started."""


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


def connect(environment: RankEnvironment, *, timeout_s: float = JOIN_TIMEOUT_S) -> Any:
    """Connects to the run's store, which rank 0 serves unless torchrun does. Tells the user about a long wait.

    Returns:
        A `TCPStore`.

    Raises:
        ConfigError: rank 0 cannot open the port.
        TrainerError: no store answers there in time.
    """
    where, is_server = environment.master_endpoint, environment.is_main and not environment.has_agent_store
    server = "torchrun" if environment.has_agent_store else "rank 0"
    try:
        with announced(lambda: f"rank {environment.rank} waits for {server} at {where}{_remedy(environment)}"):
            return TCPStore(
                environment.master_addr,
                environment.master_port,
                is_master=is_server,
                timeout=datetime.timedelta(seconds=timeout_s),
                wait_for_workers=False,  # `rendezvous` knows which ones it waits for
                multi_tenant=not environment.has_agent_store,
            )
    except DistError as error:
        if is_server:
            raise ConfigError(f"rank 0 cannot open {where}, from MASTER_ADDR and MASTER_PORT: {error}") from error
        raise TrainerError(f"rank {environment.rank} found no store at {where}: {first_line(error)}") from error


def join_round(store: Store, environment: RankEnvironment) -> str:
    """Calls `rendezvous`, and tells the user which ranks it waits for.

    Raises:
        TrainerError: ranks are missing for too long, or the store is gone.
    """
    rank, size, where = environment.rank, environment.world_size, environment.master_endpoint
    missing = list(range(1, size)) if environment.is_main else [0]

    def describe() -> str:
        names = name_numbers("rank", missing)
        return f"rank {rank} waits for {names} of {size} at {where}{_remedy(environment)}" if missing else ""

    try:
        with announced(describe):
            return rendezvous(store, rank, size, missing)
    except (RuntimeError, TimeoutError) as error:
        names = name_numbers("rank", missing) if missing else "the others"
        raise TrainerError(f"rank {rank} waited for {names} of {size} at {where}: {first_line(error)}") from error


def rendezvous(store: Store, rank: int, size: int, missing: list[int] | None = None) -> str:
    """Waits for all ranks and returns the name of the round, the same on every rank.

    Each rank except 0 writes a fresh id to `convoy/hello/<rank>`. Rank 0 answers every id with the round's name, in
    `convoy/welcome/<id>`; the rank confirms by creating its heartbeat key. When all have confirmed, rank 0 creates
    `convoy/go/<name>`. Rank 0 also answers the id of a dead rank, which nobody confirms.

    Args:
        missing: kept up to date for another thread: the ranks that this rank waits for; empty on a rank that waits for
            the same ranks as rank 0.

    Raises:
        RuntimeError: the store is gone, or ranks are missing for longer than its timeout.
        TimeoutError: ranks are missing for longer than `JOIN_TIMEOUT_S`.
    """
    my_id = uuid.uuid4().hex
    missing = [] if missing is None else missing
    if rank > 0:
        missing[:] = [0]
        store.set(f"convoy/hello/{rank}", my_id)
        store.wait([f"convoy/welcome/{my_id}"])
        missing.clear()
        round_name = store.get(f"convoy/welcome/{my_id}").decode()
        store.set(heartbeat_key(round_name, rank), "")
        store.wait([f"convoy/go/{round_name}"])
        return round_name
    round_name = my_id
    answered: dict[int, str] = {}
    missing[:] = range(1, size)
    until = time.monotonic() + JOIN_TIMEOUT_S
    while missing:
        if time.monotonic() > until:
            raise TimeoutError(f"they did not start within {JOIN_TIMEOUT_S:.0f} s")
        for other in missing:
            if not store.check([f"convoy/hello/{other}"]):
                continue
            other_id = store.get(f"convoy/hello/{other}").decode()
            if answered.get(other) != other_id:
                store.set(f"convoy/welcome/{other_id}", round_name)
                answered[other] = other_id
        missing[:] = [other for other in missing if not store.check([heartbeat_key(round_name, other)])]
        time.sleep(POLL_EVERY_S)
    for key in (heartbeat_key(round_name, 0), table_key(round_name)):
        store.set(key, "")
    store.set(f"convoy/go/{round_name}", "")
    return round_name


def _remedy(environment: RankEnvironment) -> str:
    """Returns what to do about a rank that does not start; torchrun itself starts its ranks."""
    if environment.is_torchrun:
        return ""
    return ": start it, or unset RANK and WORLD_SIZE to train with one process"
