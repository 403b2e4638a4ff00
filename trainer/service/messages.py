"""The messages of `protos/training.proto`, from and to values."""

import json
import os
from collections.abc import Iterable
from pathlib import PurePosixPath

from protos import training_pb2 as pb
from trainer.errors import ConfigError
from trainer.service.jobs import DEFAULT_RETRIES, Devices, Event, Job, JobSpec, JobState
from trainer.service.logs import Position
from trainer.service.operations import Capacity, LogRange

SERVICE = "convoy.training.v1.TrainingService"
DEFAULT_PORT = 8003
USER = "convoy-user"
"""Metadata with the caller's name, for services that ask for no token."""


def from_spec(spec: JobSpec) -> pb.JobSpec:
    """Returns a job. Bytes of a path that are not UTF-8, which a message cannot hold, become replacement characters."""
    return pb.JobSpec(
        arguments=map(_utf8, spec.arguments),
        engine=spec.engine,
        min_nodes=spec.nodes[0],
        max_nodes=spec.nodes[1],
        gpus=spec.gpus,
        cpus=spec.cpus,
        ranks=spec.ranks,
        memory_mb=spec.memory_mb,
        priority=spec.priority,
        max_retries=spec.max_retries,
        working_folder=_utf8(spec.working_folder),
        run_folder=_utf8(spec.run_folder),
        environment={name: _utf8(value) for name, value in spec.environment.items()},
        engine_options={name: _utf8(value) for name, value in spec.engine_options.items()},
    )


def _utf8(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def to_spec(message: pb.JobSpec) -> JobSpec:
    """Returns a job.

    Raises:
        ConfigError: a number is negative, or a folder is not absolute.
    """
    for name in ("min_nodes", "max_nodes", "gpus", "cpus", "ranks", "memory_mb", "max_retries"):
        if getattr(message, name) < 0:
            raise ConfigError(f"{name} is {getattr(message, name)}: must not be negative")
    least = message.min_nodes or 1
    working_folder = message.working_folder or os.getcwd()
    if not PurePosixPath(working_folder).is_absolute():
        raise ConfigError(f"working_folder is {working_folder!r}: must be an absolute path")
    run_folder = message.run_folder or str(PurePosixPath(working_folder) / "runs" / "job-{id}")
    if not PurePosixPath(run_folder).is_absolute():
        raise ConfigError(f"run_folder is {run_folder!r}: must be an absolute path")
    return JobSpec(
        arguments=tuple(message.arguments),
        engine=message.engine or "local",
        nodes=(least, max(least, message.max_nodes)),
        gpus=message.gpus,
        cpus=message.cpus,
        ranks=message.ranks,
        memory_mb=message.memory_mb,
        priority=message.priority,
        max_retries=message.max_retries if message.HasField("max_retries") else DEFAULT_RETRIES,
        working_folder=working_folder,
        run_folder=run_folder,
        environment=dict(message.environment),
        engine_options=dict(message.engine_options),
    )


def from_job(job: Job) -> pb.Job:
    return pb.Job(
        id=job.id,
        spec=from_spec(job.spec),
        owner=job.owner,
        key=job.key or "",
        state=from_state(job.state),
        reason=job.reason,
        attempt=job.attempt,
        num_retries=job.num_retries,
        submitted_at=job.submitted_at,
        started_at=job.started_at or 0,
        ended_at=job.ended_at or 0,
        exit_code=job.exit_code,
        failing_rank=job.failing_rank,
        gpus=job.devices.gpus,
        cpus=job.devices.cpus,
        figures_json=json.dumps(job.progress),
        last_event=job.next_event - 1,
    )


def to_job(message: pb.Job) -> Job:
    return Job(
        id=message.id,
        spec=to_spec(message.spec),
        owner=message.owner,
        key=message.key or None,
        state=to_state(message.state),
        reason=message.reason,
        attempt=message.attempt,
        num_retries=message.num_retries,
        submitted_at=message.submitted_at,
        started_at=message.started_at or None,
        ended_at=message.ended_at or None,
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        failing_rank=message.failing_rank if message.HasField("failing_rank") else None,
        devices=Devices(tuple(message.gpus), tuple(message.cpus)),
        progress=json.loads(message.figures_json or "{}"),
        next_event=message.last_event + 1,
    )


def from_state(state: JobState) -> pb.JobState:
    number: pb.JobState = pb.JobState.Value(state.value)
    return number


def to_state(number: int) -> JobState:
    return JobState(str(pb.JobState.Name(number)))


def to_states(numbers: Iterable[int]) -> list[JobState]:
    """Returns the states of a filter.

    Raises:
        ConfigError: there is no such state.
    """
    try:
        return [to_state(number) for number in numbers]
    except ValueError as error:
        raise ConfigError(f"states: {error}") from None


def to_log_range(message: pb.StreamLogsRequest) -> LogRange:
    """Returns what somebody wants to read.

    Raises:
        ConfigError: a number is impossible.
    """
    return LogRange(
        follow=message.follow,
        tail=message.tail if message.HasField("tail") else None,
        attempt=message.attempt or None,
        rank=message.rank if message.HasField("rank") else None,
        after=to_position(message.after) if message.HasField("after") else None,
    )


def to_position(message: pb.LogPosition) -> Position:
    return Position(message.attempt, message.offset)


def from_event(event: Event) -> pb.Event:
    message = pb.Event(number=event.number, time=event.time)
    match event.kind:
        case "state":
            message.state.state = from_state(JobState(event.data["state"]))
            message.state.reason, message.state.attempt = event.data["reason"], event.data["attempt"]
        case "progress":
            message.progress_json = json.dumps(event.data)
        case _:
            message.note = event.data["text"]
    return message


def to_event(message: pb.Event) -> Event:
    match message.WhichOneof("content"):
        case "state":
            change = message.state
            data = {"state": to_state(change.state), "reason": change.reason, "attempt": change.attempt}
            return Event(message.number, message.time, "state", data)
        case "progress_json":
            return Event(message.number, message.time, "progress", json.loads(message.progress_json))
        case _:
            return Event(message.number, message.time, "note", {"text": message.note})


def from_capacity(capacity: Capacity) -> pb.Capacity:
    return pb.Capacity(
        queues_itself=capacity.machine is None,
        gpus=capacity.num_gpus,
        cpus=capacity.num_cpus,
        gpus_in_use=capacity.gpus_in_use,
        cpus_in_use=capacity.cpus_in_use,
        active_jobs=capacity.active,
    )
