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
        attempts = (self._folder / str(job.id) / f"attempt-{number}" for number in range(1, job.attempt + 1))
        return [path for folder in attempts if (path := folder / "log").exists()]

    def forget(self, job: Job) -> None:
        shutil.rmtree(self._folder / str(job.id), ignore_errors=True)

    def _attempt(self, job: Job) -> Path:
        return self._folder / str(job.id) / f"attempt-{job.attempt}"


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the content of a file that is written by one rename; None if it is not there."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except FileNotFoundError:
        return None
