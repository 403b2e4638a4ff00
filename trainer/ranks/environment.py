"""The rank environment: the variables that torchrun sets for this process, read and checked in one place.

Imports no torch, so that a mistake is an error before that import, which takes seconds.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from trainer.errors import ConfigError

_HOW_TO_START = "start the ranks with torchrun"
_UNSET = f"unset it to train with one process, or {_HOW_TO_START}"
_MAX_PORT = 65535
_TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "FLUX_JOB_SIZE": "flux run",
}
"""Variables with the number of tasks that a launcher other than torchrun has started, and that launcher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """This process among the ranks; the defaults are those of a process without a launcher.

    Args:
        is_launched: a launcher has started this process as one of the ranks.
        local_rank: the rank among the ranks of this host.
        local_world_size: number of ranks on this host.
        master_addr: name or address of the host that serves the run's store; empty if there is one rank.
        master_port: the port there; 0 if there is one rank.
        is_torchrun: the launcher is torchrun.
        has_agent_store: torchrun serves the store at that port, so that rank 0 must not.
        has_error_file: torchrun reads the error of a failed rank from a file.
        max_restarts: number of times that torchrun may restart the ranks.
        num_restarts: number of times that it has.
        num_threads: the threads that the user chose by OMP_NUM_THREADS. torchrun sets 1 where the user has set nothing,
            so that 1 is a choice without it only.
    """

    is_launched: bool = False
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0
    is_torchrun: bool = False
    has_agent_store: bool = False
    has_error_file: bool = False
    max_restarts: int = 0
    num_restarts: int = 0
    num_threads: int | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Self:
        """Reads and checks the variables.

        Raises:
            ConfigError: one of them is no number, or they contradict each other.
        """
        size = _number(variables, "WORLD_SIZE", 1, minimum=1)
        address, port = _master(variables, size) if size > 1 else ("", 0)
        rank = _rank(variables, size)
        local_rank, local_size = _local(variables, rank, size)
        is_torchrun = "TORCHELASTIC_RUN_ID" in variables
        threads = variables.get("OMP_NUM_THREADS", "")
        return cls(
            is_launched="RANK" in variables,
            rank=rank,
            world_size=size,
            local_rank=local_rank,
            local_world_size=local_size,
            master_addr=address,
            master_port=port,
            is_torchrun=is_torchrun,
            has_agent_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            has_error_file="TORCHELASTIC_ERROR_FILE" in variables,
            max_restarts=_number(variables, "TORCHELASTIC_MAX_RESTARTS", 0),
            num_restarts=_number(variables, "TORCHELASTIC_RESTART_COUNT", 0),
            num_threads=int(threads) if _is_whole(threads) and int(threads) > is_torchrun else None,
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def has_one_host(self) -> bool:
        """Whether all ranks are on this host."""
        return self.world_size == self.local_world_size

    @property
    def master_endpoint(self) -> str:
        """The address where the ranks meet, as messages name it."""
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"{host}:{self.master_port}"


def warn_of_separate_tasks(variables: Mapping[str, str] = os.environ) -> str:
    """Returns a warning if `srun` or `mpirun` has started this process several times, else "".

    They do not set torchrun's variables, so that each of their tasks is the only rank of a run of its own.
    """
    for name, launcher in _TASKS.items():
        value = variables.get(name, "")
        if _is_whole(value) and int(value) > 1:
            return (
                f"warning: {launcher} has started {value} tasks ({name}={value}), and each of them trains on its own: "
                f"for one training by all, start one torchrun on each host (srun --ntasks-per-node=1 torchrun "
                "--nproc_per_node=N …); for one training by one process, start one task"
            )
    return ""


def _rank(variables: Mapping[str, str], size: int) -> int:
    if "RANK" in variables and "WORLD_SIZE" not in variables:
        raise ConfigError(f"RANK is set ({variables['RANK']!r}), but WORLD_SIZE is not: {_UNSET}")
    if "RANK" not in variables and size > 1:
        raise ConfigError(f"WORLD_SIZE is {size}, but RANK is not set: {_UNSET}")
    rank = _number(variables, "RANK", 0)
    if rank >= size:
        raise ConfigError(f"RANK is {rank}, but must be less than WORLD_SIZE, which is {size}: {_HOW_TO_START}")
    return rank


def _local(variables: Mapping[str, str], rank: int, size: int) -> tuple[int, int]:
    """Returns the rank on this host and the number of ranks on it."""
    local_size = _number(variables, "LOCAL_WORLD_SIZE", 1, minimum=1)
    if local_size > size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is {local_size}, but must be at most WORLD_SIZE, which is "
            f"{size if 'WORLD_SIZE' in variables else 'not set'}: {_UNSET}"
        )
    # If all ranks are on one host, the rank there is known.
    local_rank = _number(variables, "LOCAL_RANK", rank if local_size == size else 0)
    if "LOCAL_RANK" in variables and "LOCAL_WORLD_SIZE" not in variables and (size > 1 or local_rank > 0):
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but LOCAL_WORLD_SIZE is not set: set it to the number of ranks on this host, "
            f"or {_HOW_TO_START}"
        )
    if "LOCAL_RANK" not in variables and 1 < local_size < size:
        raise ConfigError(f"LOCAL_WORLD_SIZE is {local_size}, but LOCAL_RANK is not set: {_HOW_TO_START}")
    if local_rank >= local_size:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but must be less than LOCAL_WORLD_SIZE, which is {local_size}: "
            f"{_HOW_TO_START}"
        )
    if local_rank > rank:
        raise ConfigError(f"LOCAL_RANK is {local_rank}, but must be at most RANK, which is {rank}: {_HOW_TO_START}")
    return local_rank, local_size


def _master(variables: Mapping[str, str], size: int) -> tuple[str, int]:
    """Returns the address and the port of the run's store."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not variables.get(name, "").strip():
            raise ConfigError(f"WORLD_SIZE is {size}, but {name} is not set: {_HOW_TO_START}")
    port = variables["MASTER_PORT"]
    if not _is_whole(port) or not 0 < int(port) <= _MAX_PORT:
        raise ConfigError(f"MASTER_PORT is {port!r}, but must be a number from 1 to {_MAX_PORT}: {_HOW_TO_START}")
    return variables["MASTER_ADDR"].strip(), int(port)


def _number(variables: Mapping[str, str], name: str, default: int, *, minimum: int = 0) -> int:
    text = variables.get(name)
    if text is None:
        return default
    if not _is_whole(text) or int(text) < minimum:
        raise ConfigError(f"{name} is {text!r}, but must be a whole number from {minimum} on: {_UNSET}")
    return int(text)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
