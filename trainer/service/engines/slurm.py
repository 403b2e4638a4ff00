"""The engine `slurm`: jobs as batch jobs of a Slurm cluster, which queues and places them.

    jobs/17/attempt-1/script.sh   what sbatch runs: srun starts torchrun once on each host
                      slurm.json  the number that Slurm gave it; 0 if it has none, or forgot it with the job's end
                      SAVE, KILL  what the job was asked to do
                      missing.json  since when Slurm does not have the job any more
                      exit.json   the exit code, written by the script at its end
                      log         output of all ranks
                      ranks       the same of each rank, if there are several: torchrun's files

The folder must be one that all hosts see, as must the run folder. A preempted or requeued job runs its script again,
which continues the run. The batch job's name holds the job's number and attempt, so that a controller that was killed
after sbatch and before it noted the number finds the job by its name and submits nothing twice.
"""

import errno
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.errors import ConfigError, TrainerError
from trainer.files import write_json
from trainer.service import log_limit
from trainer.service.engines.attempt_folders import AttemptFolders, read_json
from trainer.service.engines.engine import EngineUnavailableError, Phase, Plan, Status
from trainer.service.jobs import Devices, Job, JobSpec, Stop
from trainer.service.logs import rank_logging

TIMEOUT_S = 60.0
SAVE_BEFORE_END_S = 90
"""Slurm sends SIGTERM so long before the time limit ends a job."""
QUEUE_AGE_S = 1.0
"""The queue is asked for all jobs at once, and not again within this time."""
GRACE_S = 10.0
"""The script's exit code may become visible on this host so long after Slurm's word that the job has ended."""
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_INTERRUPTED = {"NODE_FAIL", "PREEMPTED", "REVOKED", "BOOT_FAIL"}
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_OURS = {"array", "clusters", "error", "job-name", "nodes", "open-mode", "output", "test-only", "wait", "wrap"}
"""Options of sbatch with which this engine would lose the job, run it twice, or not have its output."""
_NO_ANSWER = re.compile("Unable to contact slurm controller|Socket timed out|Connection refused|Zero Bytes")
_NO_NUMBER = "0"
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000

_SCRIPT = """#!/bin/bash
{options}
rm -f {exit_file} {save_file}
cd {folder} || exit 2
{environment}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
first=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-}}
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK
{limit_logs} &
# A rank that fails must not end the others' hosts while they save: the ranks end each other.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --kill-on-bad-exit=0 {command}
code=$?
kill $!
echo "{{\\"code\\": $code}}" > {exit_file}.tmp && mv {exit_file}.tmp {exit_file}
exit $code
"""


class SlurmEngine(AttemptFolders):
    """Runs jobs on the Slurm cluster whose commands this host has.

    Args:
        folder: for the files of jobs; all hosts see it.
        after_end: not used, as Slurm starts the next job itself.
    """

    def __init__(self, folder: Path, after_end: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self._queue: dict[str, str] = {}
        self._queue_read_at = -QUEUE_AGE_S
        self._silent_until, self._silence = 0.0, ""

    def check(self, spec: JobSpec) -> None:
        if shutil.which("sbatch") is None:
            raise ConfigError("--engine slurm: this host has no sbatch; submit from one of the cluster's login hosts")
        for name in spec.engine_options:
            if not _OPTION.fullmatch(name):
                raise ConfigError(f"--engine-options {name}=…: must be a long option of sbatch without --")
            if name in _OURS:
                remedy = ": give --nodes" if name == "nodes" else ""
                raise ConfigError(f"--engine-options {name}=…: a job has its own{remedy}")

    def plan(self, spec: JobSpec) -> Plan:
        return Plan(("sbatch", "SCRIPT"), tuple(self._script(spec, "convoy-{id}-{attempt}", Path("JOB")).splitlines()))

    def capacity(self) -> Devices | None:
        return None

    def start(self, job: Job) -> None:
        self._begin(job, self._submit)

    def _begin(self, job: Job, otherwise: Callable[[Job], str]) -> None:
        """Notes the number of the attempt's batch job, which somebody may have submitted before.

        Args:
            otherwise: called if nobody has; returns the number.
        """
        folder = self._attempt(job)
        try:
            self._make_attempt(job)
            with (folder / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (folder / "slurm.json").exists():
                    return
                known = self._ask("squeue", "--noheader", "--states=all", f"--name={self._name(job)}", "--format=%i")
                has_ended = (folder / "exit.json").exists()  # so long ago that Slurm has forgotten it
                number = known.strip() or (_NO_NUMBER if has_ended else otherwise(job))
                write_json(folder / "slurm.json", {"job": number.splitlines()[0]})
        except OSError as error:
            kind = EngineUnavailableError if error.errno in (errno.ENOSPC, errno.EDQUOT) else TrainerError
            raise kind(f"cannot start job {job.id} in {folder}: {error.strerror or error}") from error

    def _submit(self, job: Job) -> str:
        folder = self._attempt(job)
        (folder / "script.sh").write_bytes(os.fsencode(self._script(job.spec, self._name(job), folder)))
        log = str(folder / "log").replace("%", "%%")  # %j and others stand for numbers
        submit = ("sbatch", "--parsable", f"--output={log}", str(folder / "script.sh"))
        return self._ask(*submit).strip().partition(";")[0]

    def _give_up(self, job: Job) -> str:
        """Has an attempt that nobody has submitted end as if it had been stopped."""
        write_json(self._attempt(job) / "exit.json", {"code": -signal.SIGTERM})
        return _NO_NUMBER

    def status(self, job: Job) -> Status:
        folder = self._attempt(job)
        number = self._number(job)
        if number is None:
            return Status(Phase.ABSENT)
        state = self._state(number)
        ended = read_json(folder / "exit.json")
        if ended is not None and state not in _WAITING | _RUNNING:  # a requeued script writes another one
            return Status(Phase.ENDED, int(ended["code"]))
        if state in _WAITING | _RUNNING:
            (folder / "missing.json").unlink(missing_ok=True)
            return Status(Phase.STARTING if state in _WAITING else Phase.RUNNING)
        reason = f"Slurm ended it: {state.lower().replace('_', ' ')}" if state else ""
        if state in _INTERRUPTED:
            return Status(Phase.INTERRUPTED, reason=reason)
        now, noted = time.time(), read_json(folder / "missing.json")
        since = float(noted["since"]) if noted else now
        if noted is None:
            write_json(folder / "missing.json", {"since": now})
        return Status(Phase.RUNNING) if 0 <= now - since < GRACE_S else Status(Phase.GONE, reason=reason)

    def stop(self, job: Job, stop: Stop) -> None:
        if stop is Stop.NONE:
            return
        if self._number(job) is None:
            self._begin(job, self._give_up)
        number, folder = self._number(job), self._attempt(job)
        if number in (None, _NO_NUMBER) or (folder / stop).exists():
            return
        options = []
        if stop is Stop.SAVE and self._state(str(number)) not in _WAITING:
            options = ["--signal=TERM"]
            # Its script may not have come to srun yet: then the signal would reach nobody.
            if (
                f"{number}.0"
                not in self._ask("squeue", "--steps", "--noheader", f"--jobs={number}", "--format=%i").split()
            ):
                return
        self._ask("scancel", *options, str(number))
        (folder / stop).touch()  # a second SIGTERM would end a training that still saves

    def _name(self, job: Job) -> str:
        """Returns a name that no other store's jobs have: its engine has a folder of its own."""
        return f"convoy-{job.id}-{job.attempt}-{zlib.crc32(os.fsencode(self._folder)):x}"

    def _number(self, job: Job) -> str | None:
        submitted = read_json(self._attempt(job) / "slurm.json")
        return None if submitted is None else str(submitted["job"])

    def _state(self, number: str) -> str:
        """Returns Slurm's word for a job's state; empty for one that Slurm has forgotten."""
        # A job that was submitted after the last reading is not in it.
        if number not in self._queue or time.monotonic() - self._queue_read_at >= QUEUE_AGE_S:
            lines = self._ask("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
            self._queue = dict(line.split(maxsplit=1) for line in lines if line.strip())
            self._queue_read_at = time.monotonic()
        return self._queue.get(number, "").strip()

    def _ask(self, *command: str) -> str:
        """Returns what one of Slurm's commands answers; see `_run`.

        One that waited long in vain is not followed by others for as long: all jobs of all engines would wait for them.
        """
        if time.monotonic() < self._silent_until:
            raise EngineUnavailableError(self._silence)
        began = time.monotonic()
        try:
            return _run(*command)
        except EngineUnavailableError as error:
            waited = time.monotonic() - began
            self._silence, self._silent_until = str(error), time.monotonic() + (waited if waited > 1 else 0)
            raise

    def _script(self, spec: JobSpec, name: str, folder: Path) -> str:
        least, most = spec.nodes
        options = {
            "job-name": name,
            "nodes": f"{least}-{most}" if most > least else str(least),
            "open-mode": "append",
            "signal": f"TERM@{SAVE_BEFORE_END_S}",
            "requeue": "",
        }
        if least == most:  # else Slurm would give it the least number of hosts, however many are free
            options["ntasks-per-node"] = "1"
        if spec.gpus:
            options["gpus-per-node"] = str(spec.gpus)
        if spec.cpus:
            options["cpus-per-task"] = str(spec.cpus)
        elif not spec.gpus:
            options["exclusive"] = ""
        if spec.memory_mb:
            options["mem"] = f"{spec.memory_mb}M"
        options |= spec.engine_options
        variables = rank_logging(spec, folder / "ranks") | spec.environment
        exports = [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
        return _SCRIPT.format(
            options="\n".join(
                f"#SBATCH --{key}" + (f"={_quoted(value)}" if value else "") for key, value in options.items()
            ),
            folder=shlex.quote(spec.working_folder),
            environment="\n".join(["export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}", *exports]),
            command=self._command(spec, _FIRST_PORT + zlib.crc32(name.encode()) % _NUM_PORTS),
            exit_file=shlex.quote(str(folder / "exit.json")),
            limit_logs=shlex.join([sys.executable, "-I", "-S", log_limit.__file__, str(folder)]),
            save_file=shlex.quote(str(folder / Stop.SAVE)),  # of a run before Slurm requeued it
        )

    def _command(self, spec: JobSpec, port: int) -> str:
        """Returns what runs on each host, for the shell."""
        command = [sys.executable, "-m", "trainer.launch", f"--nproc-per-node={spec.num_ranks}"]
        meeting = f'--nnodes=$SLURM_NNODES --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint="$first:{port}"'
        training = ["-m", "trainer.main", *spec.arguments, "--run-dir", spec.run_folder]
        return f"{shlex.join(command)} {meeting} {shlex.join(training)}"


def _quoted(value: str) -> str:
    """Returns the value of an option as sbatch reads it in a script."""
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return value if re.fullmatch(r"[\w.,:/@%+=-]+", value) else f'"{escaped}"'


def _run(*command: str) -> str:
    """Returns the output of one of Slurm's commands.

    Raises:
        EngineUnavailableError: Slurm's controller does not answer; it may have done what was asked.
        TrainerError: it fails, with its own message.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise EngineUnavailableError(f"{command[0]}: no answer within {TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise TrainerError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        message = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        kind = EngineUnavailableError if _NO_ANSWER.search(message) else TrainerError
        raise kind(f"{command[0]}: {message}")
    return done.stdout
