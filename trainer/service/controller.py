"""Follows active jobs, settles those that ended, and starts queued ones.

One pass does all of this once. A service makes a pass every half second; without a service each command makes one, and
so does a job that ends. Passes of several processes exclude each other by the store's lease. A pass may be cut short
anywhere: what it did not finish, the next one does, because engines start an attempt only once and the store changes a
job only from the state in which it was seen.
"""

import os
import re
import socket
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, TrainerError
from trainer.service.engines import open_engine
from trainer.service.engines.engine import Engine, EngineUnavailableError, Phase
from trainer.service.jobs import ACTIVE, Devices, Job, JobState, Stop
from trainer.service.outcome import Outcome, after_failure, judge
from trainer.service.progress import Progress
from trainer.service.scheduling import Need, choose
from trainer.service.store import JobStore, Lease, StaleError, StoreError, UnknownJobError, as_reason

LEASE_S = 5.0
"""A controller that is gone is replaced after this time."""


class Controller:
    """Makes passes over the jobs of a store.

    Args:
        folder: for the engines' files.
        after_end: a command that an engine may run when an attempt has ended; it should make a pass.
        log: receives a line about each change.
    """

    def __init__(
        self,
        store: JobStore,
        folder: Path,
        *,
        after_end: Sequence[str] = (),
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._folder = folder / store.identity  # another store's jobs have the same numbers
        self._after_end = after_end
        self._log = log
        self._engines: dict[str, Engine] = {}
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._told: dict[str, str] = {}
        self.lease: Lease | None = None

    def engine(self, name: str) -> Engine:
        """Returns an engine, opened once.

        Raises:
            ConfigError: it is not installed.
        """
        if name not in self._engines:
            self._engines[name] = open_engine(name, self._folder, self._after_end)
        return self._engines[name]

    def make_pass(self) -> bool:
        """Makes one pass. Returns whether this controller leads; if another one does, it does the work."""
        self.lease = self._store.acquire_lease(self._holder, LEASE_S)
        if self.lease is None:
            return False
        for job in self._store.active():
            self._guarded(self._follow, job, self.lease)
        self._start_queued(self.lease)
        return True

    def resign(self) -> None:
        """Lets another controller lead at once."""
        if self.lease is not None:
            self._store.release_lease(self.lease)
            self.lease = None

    def _guarded(self, act: Callable[[Job, Lease], None], job: Job, lease: Lease) -> None:
        """Does one thing for one job; another's trouble must not hold it up."""
        try:
            act(job, lease)
        except StaleError:  # a user or another controller was faster; the next pass sees what they did
            pass
        except StoreError:  # that is every job's trouble
            raise
        except (TrainerError, OSError) as error:
            self._tell(job, str(error), lease)
        except Exception as error:  # a defect, or a file in the run's folder that nobody foresaw
            self._tell(job, f"{type(error).__name__}: {error}", lease, traceback.format_exc())

    def _tell(self, job: Job, text: str, lease: Lease, details: str = "") -> None:
        """Tells the user once about something that the next pass tries again; the details are for the log alone."""
        if _kind(as_reason(text)) == _kind(job.reason):
            return
        self._log("\n".join([f"job {job.id}: {text}", *details.splitlines()]))
        with suppress(StaleError):
            self._store.add_note(job, text, lease)

    def _follow(self, job: Job, lease: Lease) -> None:
        engine = self.engine(job.spec.engine)
        status = engine.status(job)
        if status.phase is Phase.ABSENT:  # the controller that was to start it was killed before it did
            if job.stop is Stop.NONE:
                self._begin(job, lease)
                return
            engine.stop(job, job.stop)  # so that no late controller starts it either
            if engine.status(job).phase in (Phase.ABSENT, Phase.ENDED):
                self._conclude(job, Outcome(JobState.CANCELLED, "before it started"), lease, None)
            return
        job = self._read_progress(job, lease)
        if status.phase in (Phase.ENDED, Phase.GONE, Phase.INTERRUPTED):
            logs = engine.logs(job)
            outcome = judge(job, status, logs[-1] if logs else None)
            self._conclude(job, outcome, lease, status.exit_code)
        elif job.stop is not Stop.NONE:
            engine.stop(job, job.stop)  # again in each pass, as the one before may have been cut short
            if job.state is not JobState.SAVING:
                self._change(job, JobState.SAVING, "was asked to stop", lease)
        elif status.phase is Phase.RUNNING and job.state is JobState.STARTING:
            self._change(job, JobState.RUNNING, status.reason, lease)
        elif as_reason(status.reason) != job.reason:
            self._store.add_note(job, status.reason, lease)

    def _read_progress(self, job: Job, lease: Lease) -> Job:
        old = Progress.from_json(job.progress)
        new, lines = old.advanced(job.run_folder)
        if new != old:
            self._store.add_progress(job, lines, new.to_json(), lease)
        return replace(job, progress=new.to_json())

    def _conclude(self, job: Job, outcome: Outcome, lease: Lease, exit_code: int | None) -> None:
        values: dict[str, Any] = {"exit_code": exit_code, "failing_rank": outcome.failing_rank, "stop": Stop.NONE}
        if outcome.is_retry:
            values["num_retries"] = job.num_retries + 1
        if outcome.progress is not None:
            values["progress"] = outcome.progress.to_json()
        self._change(job, outcome.state, outcome.reason, lease, pause_s=outcome.pause_s, **values)

    def _start_queued(self, lease: Lease) -> None:
        active = self._store.active()
        for name, waiting in self._store.queued(self._store.now()).items():
            ready = {job.id: job for job in waiting}
            try:
                machine = self.engine(name).capacity()
            except Exception as error:  # of an engine that is not installed any more, or somebody else's
                is_known = isinstance(error, TrainerError)
                text = str(error) if is_known else f"--engine {name}: {type(error).__name__}: {error}"
                if self._told.get(name) != _kind(text):
                    self._log(text)
                self._told[name] = _kind(text)
                continue
            self._told.pop(name, None)
            if machine is None:  # it queues jobs itself
                starting = [(number, Devices()) for number in ready]
            else:
                needs = [(number, need) for number, job in ready.items() if (need := _need(job, machine))]
                starting = choose(needs, [job.devices for job in active if job.spec.engine == name], machine)
            for number, devices in starting:
                self._guarded(partial(self._start, devices=devices), ready[number], lease)

    def _start(self, job: Job, lease: Lease, devices: Devices) -> None:
        started = self._change(job, JobState.STARTING, "", lease, devices=devices.to_json())
        self._guarded(self._begin, started, lease)

    def _begin(self, job: Job, lease: Lease) -> None:
        try:
            self.engine(job.spec.engine).start(job)
        except EngineUnavailableError:
            with suppress(EngineUnavailableError):  # the answer may have been lost
                self._end_if_late(job)
            raise
        except ConfigError as error:
            self._give_up(job, Outcome(JobState.FAILED, str(error)), lease)
        except TrainerError as error:
            self._give_up(job, after_failure(job, JobState.FAILED, str(error)), lease)
        else:
            self._end_if_late(job)

    def _end_if_late(self, job: Job) -> None:
        """Ends an attempt that others gave up while this controller, which was paused, was about to start it."""
        with suppress(UnknownJobError):  # somebody has deleted it since
            known = self._store.get(job.id)
            if known.attempt == job.attempt and known.state in ACTIVE:
                return
        engine = self.engine(job.spec.engine)
        if engine.status(job).phase in (Phase.STARTING, Phase.RUNNING):
            self._log(
                f"job {job.id}: attempt {job.attempt} was given up before this controller started it: it is ended"
            )
            engine.stop(job, Stop.KILL)

    def _give_up(self, job: Job, outcome: Outcome, lease: Lease) -> None:
        """Concludes an attempt that could not be started, so that a controller that was paused does not start it."""
        with suppress(TrainerError):  # what refused the start may refuse this, too
            self.engine(job.spec.engine).stop(job, Stop.KILL)
        self._conclude(job, outcome, lease, None)

    def _change(self, job: Job, state: JobState, reason: str, lease: Lease, **values: Any) -> Job:
        changed = self._store.change(job, state, reason, lease=lease, **values)
        self._log(f"job {job.id}: {state}" + (f": {reason}" if reason else ""))
        return changed


def _kind(text: str) -> str:
    """Returns a text without its numbers: it may say how long ago, or how often."""
    return re.sub(r"\d+", "", text)


def _need(job: Job, machine: Devices) -> Need | None:
    """Returns what a job needs; None if the machine, which may have lost a GPU, does not have that."""
    cpus = job.spec.cpus or (0 if job.spec.gpus else len(machine.cpus))
    fits = job.spec.gpus <= len(machine.gpus) and cpus <= len(machine.cpus)
    return Need(job.spec.gpus, cpus) if fits else None
