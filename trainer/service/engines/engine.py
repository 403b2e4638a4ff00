"""What the controller needs of an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from trainer.errors import TrainerError
from trainer.service.jobs import Devices, Job, JobSpec, Stop


class EngineUnavailableError(TrainerError):
    """The engine cannot be used now: an API server does not answer, or a disk is full. The next pass tries again."""


class Phase(Enum):
    """How far the processes of an attempt are."""

    ABSENT = auto()
    """They were never started."""
    STARTING = auto()
    RUNNING = auto()
    ENDED = auto()
    GONE = auto()
    """They are no more, and nobody knows how they ended."""
    INTERRUPTED = auto()
    """The cluster ended them: a host was lost, or the job had to make room for another. That is no failure."""


@dataclass(frozen=True, slots=True)
class Status:
    """The state of an attempt.

    Args:
        exit_code: of an attempt that has ended; negative for a signal.
        reason: why it waits, or how it ended, where the phase and the exit code do not say it: one line for the user.
    """

    phase: Phase
    exit_code: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine would run for a job.

    Args:
        command: of each host.
        notes: lines for the user.
    """

    command: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """Runs jobs. An attempt is known by the job's number and `job.attempt`; all methods may be called again."""

    def check(self, spec: JobSpec) -> None:
        """Refuses a job that this engine can never run.

        Raises:
            ConfigError: says why.
        """

    def plan(self, spec: JobSpec) -> Plan:
        """Returns what would run."""

    def capacity(self) -> Devices | None:
        """Returns the machine that jobs share; None if the engine queues jobs itself."""

    def start(self, job: Job) -> None:
        """Starts the job's attempt with `job.devices`, unless that attempt has been started before.

        Raises:
            ConfigError: it can never be started.
            EngineUnavailableError: it is not known whether it was started; a later call starts it if it was not.
            TrainerError: it cannot be started.
        """

    def status(self, job: Job) -> Status:
        """Returns the state of the job's attempt."""

    def stop(self, job: Job, stop: Stop) -> None:
        """Asks the attempt to save and end, or ends it at once. Does nothing if it has ended.

        One that was never started is not started any more, as far as the engine can see to that.
        """

    def logs(self, job: Job) -> Sequence[Path]:
        """Returns the log file of each attempt, oldest first.

        It need not exist: an attempt may have ended before it wrote one. The last one may still grow.
        """

    def forget(self, job: Job) -> None:
        """Deletes what the engine keeps of a finished job."""
