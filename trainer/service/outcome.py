"""What the end of an attempt means for its job."""

import json
import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convoy.processes import STOP_SIGNALS
from trainer.errors import ConfigError, DataError, DivergenceError, ExportError
from trainer.paths import FAILURE_FILE, RESULT_FILE
from trainer.service.engines.engine import Phase, Status
from trainer.service.jobs import LONGEST_PAUSE_S, MAX_NUMBER, Job, JobState, Stop
from trainer.service.progress import Progress

FIRST_PAUSE_S = 10.0
"""Pauses before retries double from this one to `LONGEST_PAUSE_S`."""
MAX_STALLS = 5
"""A job that was stopped so often in a row without coming any further is not queued again."""
_CANNOT_START = 127
_PERMANENT = {
    ConfigError.exit_code: "the request cannot be met",
    DataError.exit_code: "the data cannot be read",
    DivergenceError.exit_code: "the training diverged",
    ExportError.exit_code: "the run is complete, but its model could not be exported",
    _CANNOT_START: "it cannot be started",
}
"""Failures that another attempt would repeat."""
_STOPPED = {code for number in STOP_SIGNALS for code in (128 + number, -number)}
_ERROR = re.compile(r"(\[rank (?P<rank>\d+)\] )?error: (?P<message>.*)")
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state that follows an attempt.

    Args:
        pause_s: of a job that is queued again.
        is_retry: whether it counts as one.
        progress: of the job from now on; None to leave it.
    """

    state: JobState
    reason: str
    pause_s: float = 0.0
    is_retry: bool = False
    failing_rank: int | None = None
    progress: Progress | None = None


def judge(job: Job, status: Status, log: Path | None) -> Outcome:
    """Returns what follows an attempt that has ended or is gone.

    Args:
        log: of the attempt, if it has one.
    """
    code = status.exit_code
    if _has_result(job, code):
        return Outcome(JobState.SUCCEEDED, _result_line(job.run_folder))
    if job.stop is not Stop.NONE:
        step = job.progress.get("step", 0)
        how = "saved" if code in _STOPPED else "ended" if code is None else f"exit code {code}"
        how = "ended at once" if job.stop is Stop.KILL else how
        return Outcome(JobState.CANCELLED, f"{how}, after step {step}; `convoy jobs retry {job.id}` continues it")
    if status.phase is Phase.INTERRUPTED:
        return _after_stop(job, status.reason or "the cluster ended it")
    if status.phase is Phase.GONE:
        return after_failure(job, JobState.LOST, status.reason or "its processes are gone, and left no exit code")
    if code == 0:
        return Outcome(JobState.FAILED, "it exited with 0, but its run folder has no result")
    if code in _STOPPED:
        return _after_stop(job, "it was stopped from outside and saved")
    message, rank = _failure(job, log)
    if code in _PERMANENT:
        return Outcome(JobState.FAILED, message or status.reason or _PERMANENT[code], failing_rank=rank)
    return after_failure(job, JobState.FAILED, message or status.reason or _describe(code), rank)


def after_failure(job: Job, state: JobState, reason: str, rank: int | None = None) -> Outcome:
    """Returns a retry after a pause, or `state` after the last one."""
    if job.num_retries >= job.spec.max_retries:
        return Outcome(state, reason, failing_rank=rank)
    pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**job.num_retries)
    text = f"{reason}; retry {job.num_retries + 1} of {job.spec.max_retries} in {pause:.0f} s"
    return Outcome(JobState.QUEUED, text, pause_s=pause, is_retry=True, failing_rank=rank)


def _after_stop(job: Job, reason: str) -> Outcome:
    """Returns that a job is queued again, which is no failure, unless it never gets any further."""
    progress = Progress.from_json(job.progress).stopped(job.run_folder)
    if progress.num_stalls < MAX_STALLS:
        return Outcome(JobState.QUEUED, reason, pause_s=FIRST_PAUSE_S, progress=progress)
    text = f"{reason}, {MAX_STALLS} times in a row before it came beyond step {progress.stopped_at}: "
    text += f"give it a longer time limit, or find what stops it, and `convoy jobs retry {job.id}`"
    return Outcome(JobState.FAILED, text, progress=replace(progress, num_stalls=0))


def _has_result(job: Job, code: int | None) -> bool:
    """Returns whether the attempt has completed the run, and not an earlier one, which may lack its model."""
    if code == 0:
        return os.path.exists(job.run_folder / RESULT_FILE)
    return code not in _PERMANENT and _is_of_attempt(job, job.run_folder / RESULT_FILE)


def _is_of_attempt(job: Job, path: Path) -> bool:
    """Returns whether a file was written since the attempt was started."""
    try:
        return job.started_at is not None and path.stat().st_mtime >= job.started_at
    except OSError:
        return False


def _result_line(run_folder: Path) -> str:
    result = _read(run_folder / RESULT_FILE)
    accuracy = result.get("test_accuracy")
    published = f"; published in {result['exported']}" if result.get("exported") else ""
    return f"test accuracy {100 * accuracy:.2f} %{published}" if isinstance(accuracy, int | float) else ""


def _failure(job: Job, log: Path | None) -> tuple[str, int | None]:
    """Returns the message of the rank that failed and its number, from its report or else from the log."""
    path = job.run_folder / FAILURE_FILE
    if _is_of_attempt(job, path) and (report := _read(path)):
        ranks = report.get("ranks")
        first = ranks[0] if isinstance(ranks, list) and ranks else None
        is_rank = isinstance(first, int) and 0 <= first <= MAX_NUMBER
        return str(report.get("message", "")).strip(), first if is_rank else None
    for line in reversed(_last_lines(log)):
        if found := _ERROR.match(line):
            return found["message"], None if found["rank"] is None else int(found["rank"])
    return "", None


def _last_lines(log: Path | None) -> list[str]:
    if log is None:
        return []
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _describe(code: int | None) -> str:
    number = -code if code is not None and code < 0 else (code or 0) - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    return f"{name} ended it" + (": probably for want of memory" if number == signal.SIGKILL else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
