"""The durable store of jobs, their events, and the lease of the controller that leads.

Every change of a state is one transaction, guarded by the state and the attempt that it leaves, and, for a controller,
by its lease: a change that comes too late changes nothing and raises `StaleError`.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import sqlalchemy as sa

from convoy.printable import printable
from trainer.errors import ConfigError, TrainerError
from trainer.service.jobs import (
    ACTIVE,
    FINAL,
    FOLLOWING,
    LONGEST_PAUSE_S,
    MAX_NUMBER,
    Devices,
    Event,
    Job,
    JobSpec,
    JobState,
    Stop,
)
from trainer.service.tables import CONTROLLER, connect, events, identities, jobs, leases

MAX_REASON = 1000
"""Characters of a reason, which may come from a program's output."""
MAX_HISTORY = 100
MAX_EVENTS = 1000
"""Events of a job that one call returns."""
MAX_CONSIDERED = 1000
"""Jobs of an engine that may start in one pass; others wait for one of these to start."""


class UnknownJobError(ConfigError):
    """There is no job of that number, or it belongs to another user."""


class JobStateError(ConfigError):
    """The job is in a state in which that cannot be done."""


class StoreError(TrainerError):
    """The database does not answer, or its disk is full. Nothing has changed; a later try may succeed."""


class StaleError(TrainerError):
    """The job has changed, or the controller has lost its lease, since it was read."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one controller to start and to settle jobs.

    Args:
        token: grows with each new holder.
    """

    holder: str
    token: int


class JobStore:
    """The jobs in a database. Thread-safe; several processes may share a database.

    Every method raises `StoreError` while the database does not answer or its disk is full.

    Args:
        url: see `tables.connect`.

    Raises:
        ConfigError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self._engine = connect(url)
        self._reading = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        with self._reads() as connection:
            self.identity: str = connection.scalars(sa.select(identities.c.identity)).one()
        """Tells this store from others, whose jobs have the same numbers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    def add(self, spec: JobSpec, *, owner: str, key: str | None = None) -> tuple[Job, bool]:
        """Adds a queued job; the run folder of the spec may contain `{id}`.

        Returns:
            The job, and whether it is new: it is not if the owner has used the key for the same job before.

        Raises:
            JobStateError: the owner has used the key for another job.
        """
        if key is not None and (known := self._with_key(owner, key, spec)) is not None:
            return known, False
        try:
            return self._insert(spec, owner, key), True
        except sa.exc.IntegrityError:  # another submission of the key was faster
            known = self._with_key(owner, key or "", spec)
            if known is None:
                raise
            return known, False

    def _with_key(self, owner: str, key: str, spec: JobSpec) -> Job | None:
        with self._reads() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.owner == owner, jobs.c.key == key)).first()
        if row is None:
            return None
        known = _job(row)
        if known.spec != spec.with_number(known.id):
            raise JobStateError(f"the key was used for job {known.id}, which is another training: choose a new key")
        return known

    def _insert(self, spec: JobSpec, owner: str, key: str | None) -> Job:
        with self._transaction() as connection:
            now = self._now(connection)
            values: dict[str, Any] = {
                "owner": owner,
                "key": key,
                "spec": {},
                "state": JobState.QUEUED,
                "engine": spec.engine,
            }
            values |= {"priority": spec.priority, "devices": Devices().to_json(), "progress": {}, "submitted_at": now}
            number = connection.scalar(jobs.insert().values(values).returning(jobs.c.id))
            assert number is not None
            content = spec.with_number(number).to_json()
            connection.execute(jobs.update().where(jobs.c.id == number).values(spec=content))
            _append(connection, number, now, [("state", {"state": JobState.QUEUED, "reason": "", "attempt": 0})])
            return _job(connection.execute(sa.select(jobs).where(jobs.c.id == number)).one())

    def get(self, number: int, *, owner: str | None = None) -> Job:
        """Returns a job.

        Args:
            owner: if given, jobs of others do not exist.

        Raises:
            UnknownJobError: there is no such job.
        """
        row = None
        if 0 < number <= MAX_NUMBER:
            with self._reads() as connection:
                row = connection.execute(sa.select(jobs).where(jobs.c.id == number)).first()
        if row is None or owner not in (None, row.owner):
            raise UnknownJobError(f"there is no job {number}")
        return _job(row)

    def find(
        self, *, owner: str | None = None, states: Iterable[JobState] = (), before: int | None = None, limit: int = 100
    ) -> list[Job]:
        """Returns jobs, newest first.

        Args:
            before: only jobs of smaller numbers; the last number of a page gives the next page.
        """
        query = sa.select(jobs).order_by(jobs.c.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        if states := list(states):
            query = query.where(jobs.c.state.in_(states))
        if before is not None:
            query = query.where(jobs.c.id < before)
        with self._reads() as connection:
            return [_job(row) for row in connection.execute(query)]

    def count(self) -> dict[JobState, int]:
        """Returns the number of jobs in each state."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        with self._reads() as connection:
            found = {JobState(state): number for state, number in connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    def active(self) -> list[Job]:
        """Returns all jobs that are active."""
        with self._reads() as connection:
            return [_job(row) for row in connection.execute(sa.select(jobs).where(jobs.c.state.in_(ACTIVE)))]

    def queued(self, now: float) -> dict[str, list[Job]]:
        """Returns the jobs that may start now, by engine: the first of each, as thousands may wait.

        Those of higher priorities come first, then they have the order of their numbers.
        """
        order = sa.func.row_number().over(partition_by=jobs.c.engine, order_by=(jobs.c.priority.desc(), jobs.c.id))
        ready = (
            sa.select(jobs.c.id, order.label("place")).where(jobs.c.state == JobState.QUEUED, ~_pauses(now)).subquery()
        )
        query = sa.select(jobs).join(ready, jobs.c.id == ready.c.id).where(ready.c.place <= MAX_CONSIDERED)
        found: dict[str, list[Job]] = {}
        with self._reads() as connection:
            for row in connection.execute(query.order_by(jobs.c.priority.desc(), jobs.c.id)):
                found.setdefault(row.engine, []).append(_job(row))
        return found

    def next_pause_s(self) -> float | None:
        """Returns when the first of the jobs that wait for their pause may start, in seconds; None if none does."""
        query = sa.select(sa.func.min(jobs.c.not_before)).where(jobs.c.state == JobState.QUEUED)
        with self._reads() as connection:
            now = self._now(connection)
            first = connection.scalar(query.where(_pauses(now)))
            return None if first is None else float(first) - now

    def change(
        self,
        job: Job,
        state: JobState,
        reason: str = "",
        *,
        lease: Lease | None = None,
        pause_s: float = 0.0,
        **values: Any,
    ) -> Job:
        """Moves a job from the state and the attempt in which the caller saw it into another state.

        Args:
            lease: of the controller that does it; None for a user's request.
            pause_s: a queued job starts no earlier than that.
            values: of other columns.

        Returns:
            The job as it is now.

        Raises:
            StaleError: it is not in that state and attempt any more, or the lease is another's.
            ValueError: the state cannot follow.
        """
        if state not in FOLLOWING[job.state]:
            raise ValueError(f"job {job.id}: {state} cannot follow {job.state}")
        reason = as_reason(reason)
        with self._transaction() as connection:
            now = self._now(connection)
            values |= {"state": state, "reason": reason, "not_before": now + pause_s if pause_s else 0.0}
            if state is JobState.STARTING:
                values |= {"attempt": job.attempt + 1, "started_at": now, "ended_at": None, "exit_code": None}
                values |= {"failing_rank": None}
            elif state in FINAL:
                values["ended_at"] = now
            self._update(connection, job, lease, values)
            data = {"state": state, "reason": reason, "attempt": values.get("attempt", job.attempt)}
            _append(connection, job.id, now, [("state", data)])
            return _job(connection.execute(sa.select(jobs).where(jobs.c.id == job.id)).one())

    def request_stop(self, job: Job, stop: Stop) -> Job:
        """Records that the user wants an active job to end.

        Raises:
            StaleError: the job has changed its state.
        """
        with self._transaction() as connection:
            self._update(connection, job, None, {"stop": stop})
            return _job(connection.execute(sa.select(jobs).where(jobs.c.id == job.id)).one())

    def add_progress(self, job: Job, lines: Sequence[dict[str, Any]], progress: dict[str, Any], lease: Lease) -> None:
        """Appends lines of the run's metrics to the events, and replaces the newest figures.

        Raises:
            StaleError: as in `change`.
        """
        with self._transaction() as connection:
            self._update(connection, job, lease, {"progress": progress})
            _append(connection, job.id, self._now(connection), [("progress", line) for line in lines])

    def add_note(self, job: Job, text: str, lease: Lease) -> None:
        """Appends a note to the events, and makes it the reason for the job's state; an empty one only ends the last.

        Raises:
            StaleError: as in `change`.
        """
        text = as_reason(text)
        with self._transaction() as connection:
            self._update(connection, job, lease, {"reason": text})
            _append(connection, job.id, self._now(connection), [("note", {"text": text})] if text else [])

    def events(self, number: int, *, after: int = 0) -> list[Event]:
        """Returns the first `MAX_EVENTS` of a job's events whose numbers are larger than `after`, oldest first."""
        query = sa.select(events).where(events.c.job_id == number, events.c.number > after)
        with self._reads() as connection:
            rows = connection.execute(query.order_by(events.c.number).limit(MAX_EVENTS))
            return [Event(row.number, row.time, row.kind, row.data) for row in rows]

    def history(self, number: int) -> list[Event]:
        """Returns the newest changes of a job's state, and notes, oldest first: `MAX_HISTORY` at most."""
        query = sa.select(events).where(events.c.job_id == number, events.c.kind != "progress")
        with self._reads() as connection:
            rows = connection.execute(query.order_by(events.c.number.desc()).limit(MAX_HISTORY)).all()
            return [Event(row.number, row.time, row.kind, row.data) for row in reversed(rows)]

    def delete(self, job: Job) -> None:
        """Deletes a finished job and its events; its run folder stays.

        Raises:
            StaleError: it is not in that state any more.
            JobStateError: it has not ended.
        """
        if job.state not in FINAL:
            raise JobStateError(f"job {job.id} is {job.state}: cancel it first")
        with self._transaction() as connection:
            connection.execute(events.delete().where(events.c.job_id == job.id))
            if connection.execute(jobs.delete().where(jobs.c.id == job.id, jobs.c.state == job.state)).rowcount != 1:
                raise StaleError(f"job {job.id} has changed")

    def acquire_lease(self, holder: str, duration_s: float) -> Lease | None:
        """Takes a lease that is free or has expired, or extends the holder's own; returns None if another holds it."""
        with self._transaction() as connection:
            row = connection.execute(sa.select(leases).where(leases.c.name == CONTROLLER).with_for_update()).one()
            now = self._now(connection)  # behind the lock: an earlier time would look like a clock that was put back
            if row.holder != holder and now < row.expires_at <= now + duration_s:  # else the clock was put back
                return None
            token = row.token + (row.holder != holder)
            renewed = {"holder": holder, "token": token, "expires_at": now + duration_s}
            connection.execute(leases.update().where(leases.c.name == CONTROLLER).values(renewed))
            return Lease(holder, token)

    def lease_end(self) -> float:
        """Returns when the lease ends if nobody extends it; 0 if it is free. It grows with each pass that begins."""
        with self._reads() as connection:
            return float(connection.scalars(sa.select(leases.c.expires_at).where(leases.c.name == CONTROLLER)).one())

    def release_lease(self, lease: Lease) -> None:
        """Ends a lease before its time, if it still holds."""
        mine = leases.update().where(leases.c.name == CONTROLLER, leases.c.token == lease.token)
        with self._transaction() as connection:
            connection.execute(mine.values(expires_at=0.0))

    def now(self) -> float:
        """Returns the time of the store's clock, in seconds since 1970."""
        with self._reads() as connection:
            return self._now(connection)

    @contextmanager
    def _reads(self) -> Iterator[sa.Connection]:
        with _translated_errors(), self._reading.connect() as connection:
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with _translated_errors(), self._engine.begin() as connection:
            yield connection

    def _update(self, connection: sa.Connection, job: Job, lease: Lease | None, values: dict[str, Any]) -> None:
        guarded = jobs.update().where(
            jobs.c.id == job.id, jobs.c.state == job.state, jobs.c.attempt == job.attempt, jobs.c.stop == job.stop
        )
        if lease is not None:
            holds = sa.select(leases.c.name).where(leases.c.name == CONTROLLER, leases.c.token == lease.token)
            guarded = guarded.where(holds.exists())
        if connection.execute(guarded.values(values)).rowcount != 1:
            raise StaleError(f"job {job.id} has changed since it was read")

    def _now(self, connection: sa.Connection) -> float:
        if connection.dialect.name == "sqlite":  # one machine has one clock
            return time.time()
        now = connection.scalar(sa.select(sa.func.extract("epoch", sa.func.clock_timestamp())))
        assert now is not None
        return float(now)


def _pauses(now: float) -> sa.ColumnElement[bool]:
    """Returns whether a queued job waits for its pause; a longer one than any is of a clock that was put back."""
    return (jobs.c.not_before > now) & (jobs.c.not_before <= now + LONGEST_PAUSE_S)


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Raises `StoreError` for an error that is the database's own and no defect of a statement.

    Such as a damaged file (DatabaseError itself), a server that became a read-only standby (InternalError), or no free
    connection because none of them is answered (TimeoutError).
    """
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        if isinstance(error, sa.exc.IntegrityError | sa.exc.ProgrammingError | sa.exc.DataError):
            raise
        reason = getattr(error, "orig", error)
        cause = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        raise StoreError(f"the store of the jobs cannot be used: {cause}") from error


def as_reason(text: str) -> str:
    """Returns a text as one line that any terminal and any database can hold."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


def _append(connection: sa.Connection, number: int, now: float, new: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Appends events; the row of the job, which is locked by now, counts them."""
    if not new:
        return
    counted = jobs.update().where(jobs.c.id == number).values(next_event=jobs.c.next_event + len(new))
    end = connection.scalar(counted.returning(jobs.c.next_event))
    assert end is not None
    rows = [
        {"job_id": number, "number": end - len(new) + offset, "time": now, "kind": kind, "data": data}
        for offset, (kind, data) in enumerate(new)
    ]
    connection.execute(events.insert(), rows)


def _job(row: sa.Row[Any]) -> Job:
    values = dict(row._mapping)
    del values["engine"], values["priority"]  # copies for queries
    values["spec"] = JobSpec.from_json(values["spec"])
    values["devices"] = Devices.from_json(values["devices"])
    values["state"], values["stop"] = JobState(values["state"]), Stop(values["stop"])
    return Job(**values)
