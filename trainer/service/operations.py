"""What users do with jobs. The command line without a service, and the service's front ends, call these."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from trainer.errors import ConfigError
from trainer.service import logs
from trainer.service.controller import Controller
from trainer.service.engines.engine import Plan
from trainer.service.jobs import ACTIVE, FINAL, Devices, Event, Job, JobSpec, JobState, Stop
from trainer.service.logs import LogChunk, Position
from trainer.service.patience import wait_for_answer
from trainer.service.store import JobStateError, JobStore, StaleError, StoreError


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine has.

    Args:
        machine: the devices that jobs share; None if the engine queues jobs itself.
        active: numbers of the jobs that use it.
        jobs: those of them that the caller may see.
    """

    machine: Devices | None
    active: tuple[int, ...]
    jobs: tuple[Job, ...]
    gpus_in_use: int
    cpus_in_use: int

    @property
    def num_gpus(self) -> int:
        return len(self.machine.gpus) if self.machine else 0

    @property
    def num_cpus(self) -> int:
        return len(self.machine.cpus) if self.machine else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRange:
    """What somebody wants to read of a job's output.

    Args:
        follow: also what is added, by later attempts too, until the job has ended.
        tail: of what is there, only so many last lines; None for all.
        attempt: counted from 1; it is not followed. None for the last one.
        rank: only the lines of this rank; None for all lines.
        after: what follows this place, in place of `tail` and `attempt`; None to begin there.

    Raises:
        ConfigError: a number is impossible.
    """

    follow: bool = False
    tail: int | None = None
    attempt: int | None = None
    rank: int | None = None
    after: Position | None = None

    def __post_init__(self) -> None:
        for name in ("tail", "rank"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} {getattr(self, name)}: must not be negative")
        if self.after is not None and (self.after.attempt < 1 or self.after.offset < 0):
            raise ConfigError(f"after {self.after.attempt}, {self.after.offset}: there is no such place in a log")


POLL_S = 0.5
"""Between two reads of a job that is followed."""
MAX_KEY = 255
"""Characters."""
_NUM_TRIES = 20
"""Of a change that others' changes keep making stale."""


class Operations:
    """The jobs of one store.

    Args:
        advance: has the controller make a pass; called after each change.
        refresh: the same before a job is read; a service, which makes passes all the time, needs none.
        tell: receives one line when a follower has lost the store, which is then waited for.
    """

    def __init__(
        self,
        store: JobStore,
        controller: Controller,
        advance: Callable[[], object],
        refresh: Callable[[], object] = lambda: None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._controller = controller
        self._advance = advance
        self._refresh = refresh
        self._tell = tell

    def plan(self, spec: JobSpec) -> Plan:
        """Returns what would run.

        Raises:
            ConfigError: the engine can never run it.
        """
        spec.check()
        engine = self._controller.engine(spec.engine)
        engine.check(spec)
        return engine.plan(spec)

    def submit(self, spec: JobSpec, *, owner: str, key: str | None = None) -> Job:
        """Submits a job; if the owner has used the key for the same job before, returns that job.

        Raises:
            ConfigError: the engine can never run it, or the key is impossible.
            JobStateError: the owner has used the key for another job.
        """
        if key is not None and not (key.isprintable() and len(key) <= MAX_KEY):
            raise ConfigError(f"key: must be at most {MAX_KEY} printable characters")
        spec.check()
        self._controller.engine(spec.engine).check(spec)
        job, is_new = self._store.add(spec, owner=owner, key=key)
        if is_new:
            self._advance()
        return self._store.get(job.id)

    def get(self, number: int, *, owner: str | None = None) -> Job:
        """Returns a job as it is now.

        Raises:
            UnknownJobError: there is none, or it is another's.
        """
        self._refresh()
        return self._store.get(number, owner=owner)

    def find(
        self, *, owner: str | None = None, states: Iterable[JobState] = (), before: int | None = None, limit: int = 100
    ) -> list[Job]:
        """Returns jobs, newest first; see `JobStore.find`."""
        self._refresh()
        return self._store.find(owner=owner, states=states, before=before, limit=limit)

    def cancel(self, number: int, *, now: bool = False, owner: str | None = None) -> Job:
        """Asks a job to save and end. A job that was asked before, or `now`, ends at once.

        Raises:
            JobStateError: it has ended.
            UnknownJobError: there is none.
        """

        def change(job: Job) -> None:
            if job.state is JobState.QUEUED:
                self._store.change(job, JobState.CANCELLED, "before it started")
            elif job.state in ACTIVE:
                self._store.request_stop(job, Stop.KILL if now or job.stop is not Stop.NONE else Stop.SAVE)
            else:
                raise JobStateError(f"job {number} has ended: it is {job.state}")

        return self._change(number, owner, change)

    def retry(self, number: int, *, owner: str | None = None) -> Job:
        """Queues a job again that did not succeed; its run goes on from its last checkpoint.

        Raises:
            JobStateError: it has not ended, or has succeeded.
            UnknownJobError: there is none.
        """

        def change(job: Job) -> None:
            if job.state not in FINAL or job.state is JobState.SUCCEEDED:
                raise JobStateError(
                    f"job {number} is {job.state}: only a job that has ended without success is retried"
                )
            self._store.change(job, JobState.QUEUED, "retried by its user", num_retries=0)

        return self._change(number, owner, change)

    def delete(self, number: int, *, owner: str | None = None) -> None:
        """Deletes a job that has ended, its events and its logs. Its run folder stays.

        Raises:
            JobStateError: it has not ended.
            UnknownJobError: there is none.
        """
        job = self.get(number, owner=owner)
        self._store.delete(job)
        self._controller.engine(job.spec.engine).forget(job)

    def capacity(self, engine: str) -> Capacity:
        """Returns what an engine has, and the jobs that use it.

        Raises:
            ConfigError: there is no such engine.
        """
        self._refresh()
        jobs = [job for job in self._store.active() if job.spec.engine == engine]
        return Capacity(
            self._controller.engine(engine).capacity(),
            active=tuple(job.id for job in jobs),
            jobs=tuple(jobs),
            gpus_in_use=sum(len(job.devices.gpus) for job in jobs),
            cpus_in_use=sum(len(job.devices.cpus) for job in jobs),
        )

    def events(self, number: int, *, after: int = 0) -> list[Event]:
        """Returns a job's events after the one of that number, a page of them at most."""
        return self._store.events(number, after=after)

    def history(self, number: int) -> list[Event]:
        """Returns the newest changes of a job's state, and notes; see `JobStore.history`."""
        return self._store.history(number)

    def watch(self, number: int, *, after: int = 0) -> Iterator[Event]:
        """Yields a job's events, those that are there and each new one, until the job has ended.

        Raises:
            UnknownJobError: there is no such job, or it was deleted meanwhile.
        """
        while True:
            try:
                job = self.get(number)
                # None that came later: the job may have ended, and been retried since.
                found = [event for event in self._store.events(number, after=after) if event.number < job.next_event]
            except StoreError:
                wait_for_answer(partial(self.get, number), StoreError, self._tell)
                continue
            yield from found
            after = found[-1].number if found else after
            if job.state in FINAL and after + 1 >= job.next_event:
                return
            time.sleep(POLL_S)

    def read_log(self, number: int, wanted: LogRange) -> Iterator[bytes]:
        """Yields the output of a job; see `open_log`."""
        while True:
            try:
                for content, end in self.open_log(number, wanted):
                    yield content
                    wanted = replace(wanted, after=end)
                return
            except StoreError:
                wait_for_answer(partial(self.get, number), StoreError, self._tell)

    def open_log(self, number: int, wanted: LogRange, *, owner: str | None = None) -> Iterator[LogChunk]:
        """Yields the output of a job, in pieces that may be empty.

        Raises:
            ConfigError: there is no such attempt, or no such rank.
            UnknownJobError: there is no such job.
        """

        def read_job() -> tuple[Job, Sequence[Path]]:
            job = self.get(number, owner=owner)
            return job, self._controller.engine(job.spec.engine).logs(job)

        job, paths = read_job()
        if wanted.attempt is not None and not 1 <= wanted.attempt <= job.attempt:
            raise ConfigError(f"attempt {wanted.attempt}: job {number} has {job.attempt}")
        prefix, written = logs.prefix_of(wanted.rank, job.spec), logs.written(paths)
        start = wanted.after or Position(wanted.attempt or max(written, default=1), 0)
        if wanted.after is None and wanted.tail is not None and start.attempt in written:
            start = Position(start.attempt, logs.tail(paths[start.attempt - 1], wanted.tail, prefix))
        if wanted.follow and wanted.attempt is None:
            return logs.follow(read_job, start, prefix)
        return logs.read(paths[start.attempt - 1], start, prefix) if start.attempt in written else iter(())

    def _change(self, number: int, owner: str | None, change: Callable[[Job], None]) -> Job:
        for _ in range(_NUM_TRIES):
            try:
                change(self.get(number, owner=owner))
                self._advance()
                break
            except StaleError:  # it has moved on since it was read
                continue
        else:
            raise StaleError(f"job {number} keeps changing: try again")
        return self.get(number, owner=owner)
