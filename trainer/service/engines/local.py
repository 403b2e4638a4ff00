"""The engine `local`: jobs as processes of this machine, which outlive the service.

    jobs/17/attempt-1/command.json   what runs: arguments, folder, environment, CPUs
                      lock           held by the attempt's runner for as long as it lives
                      process.json   the runner, once it has begun
                      waits          why its job does not begin yet
                      exit.json      the exit code, once it has ended
                      log            output of all ranks, of bounded size: see `log_limit`
                      ranks          the same of each rank, if there are several: torchrun's files

The lock decides everything: an attempt is alive while it is held. Whoever starts an attempt takes the lock first and
hands it to the runner, so that no attempt is ever started twice; the kernel frees it when the runner dies.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convoy.cpus import num_available_cpus
from trainer.errors import ConfigError, TrainerError
from trainer.files import write_json
from trainer.service.engines import local_runner, memory_limit
from trainer.service.engines.attempt_folders import AttemptFolders, read_json
from trainer.service.engines.engine import EngineUnavailableError, Phase, Plan, Status
from trainer.service.jobs import Devices, Job, JobSpec, JobState, Stop
from trainer.service.logs import rank_logging

_WITHOUT_RUNNER = "somebody has killed its runner; what is left of it goes on, until `convoy jobs cancel --now` ends it"
_SIGNALS = {Stop.SAVE: signal.SIGTERM, Stop.KILL: signal.SIGQUIT}


class LocalEngine(AttemptFolders):
    """Runs jobs on this machine.

    Args:
        folder: for the files of jobs.
        after_end: the command that the runner of an attempt becomes at its end.
    """

    def __init__(self, folder: Path, after_end: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self._after_end = after_end

    def check(self, spec: JobSpec) -> None:
        machine = self.capacity()
        if spec.nodes[0] > 1:
            raise ConfigError("--nodes: the engine local has one host; use the engine of a cluster")
        if spec.gpus > len(machine.gpus):
            raise ConfigError(f"--gpus {spec.gpus}: this machine has {len(machine.gpus)}")
        if spec.cpus > len(machine.cpus):
            raise ConfigError(f"--cpus {spec.cpus}: this machine has {len(machine.cpus)}")
        if not os.path.isdir(spec.working_folder):
            raise ConfigError(f"{spec.working_folder}: no such folder")

    def plan(self, spec: JobSpec) -> Plan:
        command = [sys.executable]
        if spec.max_ranks > 1:
            command += ["-m", "trainer.launch", "--standalone", f"--nproc-per-node={spec.num_ranks}"]
        command += ["-m", "trainer.main", *spec.arguments]
        notes = [f"in {spec.working_folder}"]
        if spec.memory_mb and not memory_limit.is_allowed():
            notes.append("without a limit of memory: this user may not create control groups")
        return Plan((*command, "--run-dir", spec.run_folder), tuple(notes))

    def capacity(self) -> Devices:
        """Returns the GPUs that `CUDA_VISIBLE_DEVICES` leaves, and the CPUs that this process may use.

        GPUs that a runner holds, perhaps for a job of another store, come last.
        """
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return Devices(held_last(_visible_gpus()), tuple(cpus[: num_available_cpus()]))

    def start(self, job: Job) -> None:
        folder = self._attempt(job)
        with self._unless_begun(job) as lock:
            if lock is None:
                return
            write_json(folder / "command.json", self._command(job))
            # By its path, so that it starts in a few hundredths of a second: it imports nothing of ours.
            command = [sys.executable, "-I", "-S", local_runner.__file__, str(folder), str(lock)]
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(lock,),
                    check=True,
                )
            except subprocess.CalledProcessError as error:
                raise TrainerError(f"cannot start job {job.id} in {folder}: its runner failed") from error

    def status(self, job: Job) -> Status:
        folder = self._attempt(job)
        is_alive = _is_locked(folder / "lock")  # looked at first: the exit code is written before the lock is free
        if (ended := read_json(folder / "exit.json")) is not None:
            return Status(Phase.ENDED, int(ended["code"]))
        has_begun = (folder / "process.json").exists()
        if is_alive:
            if (reason := _read(folder / "waits")) or not has_begun:
                return Status(Phase.STARTING, reason=reason)
            return Status(Phase.RUNNING, reason="" if _runs(folder) else _WITHOUT_RUNNER)
        if not has_begun and self._runner(job) is not None:
            return Status(Phase.RUNNING, reason=f"somebody has deleted its files in {folder}; it goes on")
        if local_runner.processes(folder):
            return Status(Phase.RUNNING, reason=_WITHOUT_RUNNER)
        if not has_begun and job.state in (JobState.RUNNING, JobState.SAVING):
            reason = f"{socket.gethostname()} has no files of it: another host runs it, or somebody deleted them"
            return Status(Phase.GONE, reason=reason)
        return Status(Phase.GONE if has_begun else Phase.ABSENT)

    def stop(self, job: Job, stop: Stop) -> None:
        if stop is Stop.NONE:
            return
        process, folder = self._runner(job), self._attempt(job)
        if process is None:
            if stop is Stop.KILL:
                local_runner.kill_processes(folder)
            with self._unless_begun(job) as lock:
                if lock is not None and not local_runner.processes(folder):
                    write_json(folder / "exit.json", {"code": -_SIGNALS[stop]})
            return
        number = int(process["pid"])
        try:
            descriptor = os.pidfd_open(number)  # this process, and no later one of its number
            try:
                if local_runner.start_time(number) != process["start_time"]:
                    raise ProcessLookupError(number)
                signal.pidfd_send_signal(descriptor, _SIGNALS[stop])
            finally:
                os.close(descriptor)
        except ProcessLookupError:
            # Somebody has killed the runner; the kernel has sent its child SIGTERM, to which that may not listen.
            if stop is Stop.KILL:
                local_runner.kill_processes(folder)

    def _runner(self, job: Job) -> dict[str, Any] | None:
        """Returns the attempt's runner as it has noted itself, or, if its files are gone, as the system knows it."""
        folder = self._attempt(job)
        return read_json(folder / "process.json") or local_runner.find(folder)

    @contextmanager
    def _unless_begun(self, job: Job) -> Iterator[int | None]:
        """Context in which nobody else starts the attempt; yields the descriptor of its lock, None if it has begun.

        Raises:
            EngineUnavailableError, TrainerError: its files cannot be written.
        """
        folder = self._attempt(job)
        try:
            self._make_attempt(job)
            with (folder / "lock").open("ab") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield None
                    return
                has_begun = any((folder / name).exists() for name in ("process.json", "exit.json"))
                yield None if has_begun else lock.fileno()
        except OSError as error:
            kind = EngineUnavailableError if error.errno in local_runner.PASSING else TrainerError
            raise kind(f"cannot start job {job.id} in {folder}: {error.strerror or error}") from error

    def _command(self, job: Job) -> dict[str, Any]:
        environment = (
            {"OMP_NUM_THREADS": "1"} if job.spec.max_ranks > 1 else {}
        )  # else torchrun warns; ranks set theirs
        environment |= {**os.environ, **job.spec.environment}
        if job.devices.gpus or job.spec.gpus == 0:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.devices.gpus)
        environment |= rank_logging(job.spec, self._attempt(job) / "ranks")
        environment[local_runner.ATTEMPT] = str(self._attempt(job))
        return {
            "arguments": self.plan(job.spec).command,
            "folder": job.spec.working_folder,
            "environment": environment,
            "cpus": job.devices.cpus,
            "gpus": job.devices.gpus,
            "after_end": self._after_end,
            "cgroup": memory_limit.create(f"convoy-{job.id}-{job.attempt}", job.spec.memory_mb),
        }


def _visible_gpus() -> tuple[str, ...]:
    """Returns the GPUs' names for `CUDA_VISIBLE_DEVICES`; reads device files, as CUDA takes seconds to start."""
    present = sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return tuple(present)
    return tuple(name for name in visible.split(",") if name.strip() not in ("", "-1"))


def held_last(gpus: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of GPUs, behind the others those that a runner of this machine holds."""
    held = {line.rpartition(" @")[2] for line in _read(Path("/proc/net/unix")).splitlines()}
    return tuple(sorted(gpus, key=lambda gpu: local_runner.GPU_NAME.format(gpu) in held))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _runs(folder: Path) -> bool:
    """Returns whether the runner that has noted itself in a folder is still there."""
    process = read_json(folder / "process.json")
    try:
        return process is None or local_runner.start_time(process["pid"]) == process["start_time"]
    except ProcessLookupError:
        return False


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
