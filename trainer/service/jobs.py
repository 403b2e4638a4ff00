"""Jobs as values: what a user submits, and the states that a job goes through."""

import re
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, Self

from trainer.errors import ConfigError

MAX_NUMBER = 2**31 - 1
"""Of what a user counts, and of a job: the API's and the store's integers have 32 bits."""
MAX_TEXT = 100_000
"""Characters of a job's arguments, folders, variables and options: every pass reads all jobs that wait, and a kernel
takes only 128 KiB as one argument."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBERS = ("gpus", "cpus", "ranks", "memory_mb", "priority", "max_retries")


class JobState(StrEnum):
    """The state of a job."""

    QUEUED = "QUEUED"
    """Waits for its turn, for resources, or for the pause before a retry."""
    STARTING = "STARTING"
    """An engine has been asked to run it."""
    RUNNING = "RUNNING"
    SAVING = "SAVING"
    """Was asked to stop, and saves a checkpoint."""
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    LOST = "LOST"
    """Its processes are gone and left neither a result nor an exit code, as after a power failure."""


ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING, JobState.SAVING})
FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.LOST})
FOLLOWING: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.CANCELLED}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.SAVING, JobState.QUEUED}) | FINAL,
    JobState.RUNNING: frozenset({JobState.SAVING, JobState.QUEUED}) | FINAL,
    JobState.SAVING: frozenset({JobState.QUEUED}) | FINAL,
    **dict.fromkeys(FINAL - {JobState.SUCCEEDED}, frozenset({JobState.QUEUED})),
    JobState.SUCCEEDED: frozenset(),
}
"""The states that may follow each state."""


class Stop(StrEnum):
    """What a user asked of a job that runs."""

    NONE = ""
    SAVE = "SAVE"
    """To save a checkpoint and end."""
    KILL = "KILL"
    """To end at once."""


DEFAULT_RETRIES = 2
LONGEST_PAUSE_S = 600.0
"""Of a queued job before a retry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A submitted job.

    Args:
        arguments: options of `trainer/main.py`, which `convoy train` has too; without `--run-dir`.
        engine: the name of the engine that runs it.
        nodes: least and largest number of hosts.
        gpus: GPUs of each host; 0 for a job that computes on CPUs.
        cpus: CPUs of each host; 0 for all that the engine has, or, beside GPUs, for those that nobody asked for.
        ranks: processes of each host; 0 for one for each GPU, or one.
        memory_mb: limit of each host's memory, in MB of 10^6 bytes; 0 for none.
        priority: a job of a higher priority starts first.
        max_retries: how often a failure that may pass is tried again.
        working_folder: absolute; relative paths of the arguments begin there.
        run_folder: absolute path of the run's folder, which every attempt continues.
        environment: variables that are added to the engine's.
        engine_options: of this engine alone, such as Slurm's partition.
    """

    arguments: tuple[str, ...]
    engine: str = "local"
    nodes: tuple[int, int] = (1, 1)
    gpus: int = 0
    cpus: int = 0
    ranks: int = 0
    memory_mb: int = 0
    priority: int = 0
    max_retries: int = DEFAULT_RETRIES
    working_folder: str
    run_folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    engine_options: dict[str, str] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        """Processes of each host."""
        return self.ranks or max(1, self.gpus)

    @property
    def max_ranks(self) -> int:
        """Processes of all hosts, at most."""
        return self.nodes[1] * self.num_ranks

    def check(self) -> None:
        """Checks what no engine could use: it would only fail when the job starts.

        Raises:
            ConfigError: says what is wrong.
        """
        given = {"arguments": self.arguments, "working_folder": (self.working_folder,)}
        given |= {"run_folder": (self.run_folder,), "environment": tuple(self.environment.values())}
        for name, texts in given.items():
            if any("\0" in text for text in texts):
                raise ConfigError(f"{name}: must not contain the character NUL")
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"environment: {name[:40]!r} is no name of a variable: letters, digits and _")
        for name, value in self.engine_options.items():
            if not value.isprintable():  # it may become a line of a script
                raise ConfigError(f"engine option {name[:40]}: its value must be one line without control characters")
        words = [self.engine, self.working_folder, self.run_folder, *self.arguments]
        size = sum(map(len, [*words, *chain(*self.environment.items()), *chain(*self.engine_options.items())]))
        if size > MAX_TEXT:
            raise ConfigError(f"the texts of a job may have {MAX_TEXT} characters in all: these have {size}")
        for name in _NUMBERS:
            if abs(getattr(self, name)) > MAX_NUMBER:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at most {MAX_NUMBER}")

    def with_number(self, number: int) -> Self:
        """Returns the spec of the job of that number, which the run folder may name as `{id}`."""
        return replace(self, run_folder=self.run_folder.replace("{id}", str(number)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Reads `to_json`'s value; leaves out fields that a newer version has written."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["arguments"], known["nodes"] = tuple(known["arguments"]), tuple(known.get("nodes", (1, 1)))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Devices:
    """The part of a machine that a job has.

    Args:
        gpus: as `CUDA_VISIBLE_DEVICES` names them.
        cpus: numbers of the CPUs.
    """

    gpus: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(tuple(values["gpus"]), tuple(values["cpus"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of the store. Times are seconds since 1970, from the store's clock.

    Args:
        key: the client's, for submitting once; unique for each owner.
        reason: why the job is in its state, one line for the user.
        attempt: counted from 1; 0 before the first start.
        num_retries: failures that were tried again since the user submitted or retried the job.
        stop: what the user asked of it.
        devices: what it has while it is active, and had in its last attempt.
        not_before: a queued job starts no earlier.
        exit_code: of the last attempt that ended; negative for a signal.
        failing_rank: of the last failure, where a rank is at fault.
        progress: the newest figures of the run, see `progress.Progress`.
    """

    id: int
    spec: JobSpec
    owner: str
    key: str | None
    state: JobState
    reason: str = ""
    attempt: int = 0
    num_retries: int = 0
    stop: Stop = Stop.NONE
    devices: Devices = field(default_factory=Devices)
    submitted_at: float
    started_at: float | None = None
    ended_at: float | None = None
    not_before: float = 0.0
    exit_code: int | None = None
    failing_rank: int | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    next_event: int = 1

    @property
    def run_folder(self) -> Path:
        return Path(self.spec.run_folder)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a job's history.

    Args:
        number: counted from 1 in each job, without gaps.
        time: seconds since 1970.
        kind: `state`, `progress` or `note`.
        data: of a state: `state`, `reason`, `attempt`; of progress: a line of the run's metrics; of a note: `text`.
    """

    number: int
    time: float
    kind: str
    data: dict[str, Any]
