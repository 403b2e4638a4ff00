"""`convoy jobs`: submits trainings as jobs of this machine, and lists, follows, cancels and retries them."""

import codecs
import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from convoy.options import option
from convoy.printable import printable
from convoy.verbs import Verb, run_verb
from trainer.cli import parse, run_command
from trainer.errors import ConfigError
from trainer.progress import duration
from trainer.service.embedded import default_store, open_jobs, user_name
from trainer.service.jobs import FINAL, MAX_NUMBER, Job, JobState
from trainer.service.json_values import event_json, job_json
from trainer.service.operations import LogRange
from trainer.service.submission import Submission, to_spec

if TYPE_CHECKING:
    from trainer.service.client import RemoteJobs
    from trainer.service.operations import Operations

PROG = "convoy jobs"
StateName = Literal["queued", "starting", "running", "saving", "succeeded", "failed", "cancelled", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Where the jobs are."""

    service: Annotated[str | None, option("HOST:PORT", "$CONVOY_SERVICE, or this machine's own jobs")] = field(
        default_factory=lambda: os.environ.get("CONVOY_SERVICE") or None
    )
    """The service that has the jobs."""
    token_file: Annotated[Path | None, option("FILE", "none")] = None
    """File with the token for the service."""
    tls_ca: Annotated[Path | None, option("FILE", "plain text")] = None
    """Certificate of the authority that signs the service's, for TLS."""

    store: Annotated[str, option("FILE", "~/.local/state/convoy/jobs.db")] = field(
        default_factory=lambda: str(default_store())
    )
    """Without a service: the file with the jobs, or postgresql://USER@HOST/NAME."""

    creates_store: ClassVar[bool] = False

    @contextmanager
    def open(self) -> Iterator["Operations | RemoteJobs"]:
        """Context of the jobs.

        Raises:
            ConfigError: the store, or a file, cannot be opened, or options do not belong together.
        """
        is_default = self.store == str(default_store())
        if self.service is None and (self.token_file or self.tls_ca):
            raise ConfigError("--token-file and --tls-ca are for a service: give --service, or set CONVOY_SERVICE")
        if self.service is not None and not is_default:
            raise ConfigError(f"--store {self.store}: the service {self.service} has its own; give one of them")
        tell = partial(print, file=sys.stderr, flush=True)
        if not (is_default or self.creates_store or "://" in self.store or os.path.exists(self.store)):
            raise ConfigError(f"--store {self.store} does not exist: convoy jobs submit makes it")
        if self.service is None:
            with open_jobs(self.store, tell) as jobs:
                yield jobs
        else:
            from trainer.service.client import open_service  # imports grpc

            with open_service(self.service, self.token_file, self.tls_ca, tell) as remote:
                yield remote


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitConfig(StoreConfig):
    """Submits a training: convoy jobs submit [OPTIONS] [PATH-OR-RECIPE] -- OPTIONS OF convoy train."""

    creates_store: ClassVar[bool] = True

    submission: Annotated[Submission, tyro.conf.OmitArgPrefixes] = field(default_factory=Submission)
    key: Annotated[str | None, option("TEXT", "none")] = None
    """Submit once: with the same key and training again, show the job that exists."""
    dry_run: bool = False
    """Show what would run, and submit nothing."""
    training: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What follows the `--`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListConfig(StoreConfig):
    """Lists jobs, newest first."""

    state: Annotated[tuple[StateName, ...], option("STATE ...", "all")] = ()
    """Only jobs in these states."""
    before: Annotated[int | None, option("JOB", "the newest")] = None
    """Only jobs of smaller numbers: the next page."""
    limit: int = 50
    """Number of jobs at most."""
    json: bool = False
    """One JSON object a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig(StoreConfig):
    """A job."""

    job: Annotated[int, tyro.conf.Positional, option("JOB")]
    """The number of the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig(JobConfig):
    """Shows a job with its history."""

    json: bool = False
    """As one JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogsConfig(JobConfig):
    """Prints the output of a job's ranks; of its last attempt, unless it is followed."""

    follow: bool = False
    """Go on until the job has ended."""
    tail: Annotated[int | None, option("LINES", "all")] = None
    """Begin with the last lines only."""
    attempt: Annotated[int | None, option("NUMBER", "the last one")] = None
    """Print the output of another attempt."""
    rank: Annotated[int | None, option("NUMBER", "all")] = None
    """Print the output of one rank only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig(JobConfig):
    """Prints a job's states and figures until it has ended; exits with 0 if it succeeded, and else with 1."""

    after: int = 0
    """Only events after the one of this number."""
    json: bool = False
    """One JSON object a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelConfig(JobConfig):
    """Asks a job to save and to end. A second time, it ends at once."""

    now: bool = False
    """End it at once, without saving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryConfig(JobConfig):
    """Continues a job that failed, was cancelled or lost, from its last checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteConfig(JobConfig):
    """Deletes a job that has ended, and its logs. Its run folder stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityConfig(StoreConfig):
    """Shows what the machine has, and what its jobs use."""

    engine: Annotated[str, option("NAME", "local")] = "local"
    """What runs jobs: local (this machine), slurm or kubernetes (a cluster)."""


def jobs_command(arguments: Sequence[str]) -> int:
    """Runs `convoy jobs VERB`."""
    return run_verb(PROG, {name: _verb(name, *entry) for name, entry in COMMANDS.items()}, arguments)


def _verb(name: str, kind: type[Any], run: Callable[[Any], int | None], summary: str) -> Verb:
    def command(arguments: Sequence[str]) -> int | None:
        ours, training = _divide(arguments) if kind is SubmitConfig else (arguments, ())
        config = parse(kind, ours, prog=f"{PROG} {name}")

        def checked() -> int | None:
            _check_numbers(config)
            return run(replace(config, training=training) if training else config)

        run_command(checked)

    return Verb(summary, command)


def _check_numbers(config: Any) -> None:
    for setting in fields(config):
        value = getattr(config, setting.name)
        if isinstance(value, int) and not 0 <= value <= MAX_NUMBER:
            name = "job" if setting.name == "job" else f"--{setting.name}"
            raise ConfigError(f"{name} {value}: must be at least 0, and at most {MAX_NUMBER}")


def _divide(arguments: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """Returns what is before and after `--`."""
    if "--" not in arguments:
        return arguments, ()
    position = list(arguments).index("--")
    return arguments[:position], tuple(arguments[position + 1 :])


def _submit(config: SubmitConfig) -> None:
    spec = to_spec(config.submission, config.training)
    with config.open() as jobs:
        if config.dry_run:
            plan = jobs.plan(spec)
            print("\n".join([shlex.join(plan.command), *plan.notes]))
            return
        job = jobs.submit(spec, owner=user_name(), key=config.key)
        print(f"job {job.id}, {job.state.lower()} on {job.spec.engine}: {job.spec.run_folder}")
        if job.state is JobState.QUEUED:
            print(f"convoy jobs capacity shows what runs; convoy jobs watch {job.id} follows it")
        elif job.state is JobState.FAILED:  # at once: the engine could not start it
            print(job.reason)


def _list(config: ListConfig) -> None:
    with config.open() as jobs:
        states = [JobState(name.upper()) for name in config.state]
        found = jobs.find(states=states, before=config.before, limit=min(config.limit + 1, MAX_NUMBER))
    has_more, found = len(found) > config.limit, found[: config.limit]
    if config.json:
        for job in found:
            print(json.dumps(job_json(job)))
        return
    if not found:
        print("no jobs" + (f" that are {' or '.join(config.state)}" if config.state else ""))
        return
    rows = [("JOB", "STATE", "ENGINE", "GPUS", "AGE", "PROGRESS", "TRAINING"), *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{width}s}" for text, width in zip(row, widths, strict=True)).rstrip())
    if has_more:
        print(f"more: convoy jobs list --before {found[-1].id}")


def _show(config: ShowConfig) -> None:
    with config.open() as jobs:
        job = jobs.get(config.job)
        events = jobs.history(config.job)
        if config.json:
            print(json.dumps(job_json(job) | {"events": [event_json(event) for event in events]}))
            return
        try:
            command = shlex.join(jobs.plan(job.spec).command)
        except ConfigError:  # it could not be submitted any more: a folder is gone, or a GPU
            command = ""
    facts = {
        "state": job.state.lower() + (f": {job.reason}" if job.reason else ""),
        "owner": job.owner,
        "engine": job.spec.engine,
        "devices": _devices(job),
        "attempt": f"{job.attempt}, {job.num_retries} of {job.spec.max_retries} retries",
        "exit code": "" if job.exit_code is None else str(job.exit_code),
        "failing rank": "" if job.failing_rank is None else str(job.failing_rank),
        "progress": _progress(job),
        "run folder": job.spec.run_folder,
        "in": job.spec.working_folder,
        "command": command,
    }
    print(f"job {job.id}")
    for name, text in facts.items():
        if text:
            print(f"  {name:13s} {printable(text)}")
    if events and events[0].number > 1:
        print(f"  …  (convoy jobs watch {job.id} has all)")
    for event in events:
        if event.kind == "state":
            reason = f": {event.data['reason']}" if event.data["reason"] else ""
            print(f"  {_clock(event.time)}  {event.data['state']}{reason}")


def _logs(config: LogsConfig) -> None:
    wanted = LogRange(follow=config.follow, tail=config.tail, attempt=config.attempt, rank=config.rank)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a chunk may end within a character
    with config.open() as jobs:
        for chunk in jobs.read_log(config.job, wanted):
            sys.stdout.write(decoder.decode(chunk))
            sys.stdout.flush()


def _watch(config: WatchConfig) -> int:
    with config.open() as jobs:
        state = None
        for event in jobs.watch(config.job, after=config.after):
            state = event.data["state"] if event.kind == "state" else state
            if config.json:
                print(json.dumps(event_json(event)), flush=True)
            else:
                print(f"{_clock(event.time)}  {_describe_event(event.kind, event.data)}", flush=True)
        return 0 if (state or jobs.get(config.job).state) == JobState.SUCCEEDED else 1


def _cancel(config: CancelConfig) -> None:
    with config.open() as jobs:
        job = jobs.cancel(config.job, now=config.now)
        print(f"job {job.id}: {job.state.lower()}" + (f": {job.reason}" if job.reason else ""))


def _retry(config: JobConfig) -> None:
    with config.open() as jobs:
        print(f"job {config.job}: {jobs.retry(config.job).state.lower()}")


def _delete(config: JobConfig) -> None:
    with config.open() as jobs:
        folder = jobs.get(config.job).spec.run_folder
        jobs.delete(config.job)
        print(f"job {config.job} is deleted; its run stays in {folder}")


def _capacity(config: CapacityConfig) -> None:
    with config.open() as jobs:
        capacity = jobs.capacity(config.engine)
    if capacity.machine is None:
        print(f"{config.engine} queues jobs itself; {len(capacity.active)} are with it")
        return
    print(f"GPUs: {capacity.gpus_in_use} of {capacity.num_gpus} in use")
    print(f"CPUs: {capacity.cpus_in_use} of {capacity.num_cpus} in use")
    for job in capacity.jobs:
        print(f"  job {job.id}  {_devices(job)}")
    if others := len(capacity.active) - len(capacity.jobs):
        print(f"  {others} of other users")


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int | None], str]] = {
    "submit": (SubmitConfig, _submit, "submit a training"),
    "list": (ListConfig, _list, "list jobs"),
    "show": (ShowConfig, _show, "show a job with its history"),
    "logs": (LogsConfig, _logs, "print the output of a job, or follow it"),
    "watch": (WatchConfig, _watch, "follow a job's states and figures"),
    "cancel": (CancelConfig, _cancel, "save and end a job; again: end it at once"),
    "retry": (RetryConfig, _retry, "continue a job that failed, was cancelled or lost"),
    "delete": (DeleteConfig, _delete, "delete a job that has ended; its run folder stays"),
    "capacity": (CapacityConfig, _capacity, "show what the machine has and its jobs use"),
}


def _row(job: Job) -> tuple[str, ...]:
    training = printable(shlex.join(job.spec.arguments)) or "mnist"
    gpus = str(job.spec.gpus) if job.spec.gpus else "-"
    age = duration(time.time() - job.submitted_at)
    shown = training if len(training) <= 60 else training[:57] + "..."
    return str(job.id), job.state.lower(), job.spec.engine, gpus, age, _progress(job) or "-", shown


def _devices(job: Job) -> str:
    if job.state in FINAL or not (job.devices.gpus or job.devices.cpus):
        wanted = [f"{job.spec.gpus} GPUs"] if job.spec.gpus else []
        wanted += [f"{job.spec.cpus or 'all'} CPUs"] if job.spec.cpus or not job.spec.gpus else []
        return "asks for " + " and ".join(wanted)
    parts = [f"GPU {', '.join(job.devices.gpus)}"] if job.devices.gpus else []
    parts += [f"CPU {', '.join(map(str, job.devices.cpus))}"] if job.devices.cpus else []
    return "; ".join(parts)


def _progress(job: Job) -> str:
    figures = _numbers(job.progress.get("figures", {}))
    parts = [f"epoch {job.progress['epoch']}"] if job.progress.get("epoch") else []
    if "test_accuracy" in figures:
        parts.append(f"test {100 * figures['test_accuracy']:.2f} %")
    elif "val_accuracy" in figures:
        parts.append(f"validation {100 * figures['val_accuracy']:.2f} %")
    elif figures.get("step"):
        parts.append(f"step {figures['step']}")
    return ", ".join(parts)


def _describe_event(kind: str, data: dict[str, Any]) -> str:
    if kind == "state":
        return str(data["state"]).lower() + (f": {data['reason']}" if data["reason"] else "")
    if kind == "note":
        return str(data["text"])
    numbers = _numbers(data)
    figures = [f"{name} {value:.4f}" for name, value in numbers.items() if "loss" in name]
    figures += [f"{name} {100 * value:.2f} %" for name, value in numbers.items() if "accuracy" in name]
    where = f"step {data['step']}" if data["kind"] == "step" else f"epoch {data['epoch']}"
    return "  ".join([where, *figures])


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Returns the figures that have a value, which comes from a file that any program may write."""
    return {printable(name): value for name, value in figures.items() if isinstance(value, int | float)}


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
