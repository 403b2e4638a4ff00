"""A folder for each attempt of a job: `jobs/17/attempt-1`. What engines that keep files have in common."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.service.jobs import Job


class AttemptFolders:
    """Base class of engines that keep files.

    Args:
        folder: for the files of all jobs of one store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "jobs"

    def logs(self, job: Job) -> Sequence[Path]:
        job_folder = self._folder / str(job.id)
        return [job_folder / f"attempt-{number}" / "log" for number in range(1, job.attempt + 1)]

    def _make_attempt(self, job: Job) -> Path:
        """Creates the attempt's folder, in one that only this user reads: it has the variables of the job."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = self._attempt(job)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def forget(self, job: Job) -> None:
        shutil.rmtree(self._folder / str(job.id), ignore_errors=True)

    def _attempt(self, job: Job) -> Path:
        return self._folder / str(job.id) / f"attempt-{job.attempt}"


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the content of a file that is written by one rename; None if it is not there, or a crash damaged it."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
