"""Reads how far a run is from its folder, while another process trains it. Imports no torch, which takes seconds."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from convoy.named_files import read_regular
from trainer.errors import ConfigError, no_run
from trainer.files import is_locked
from trainer.paths import CHECKPOINTS, FAILURE_FILE, LOCK_FILE, RESULT_FILE
from trainer.records.metrics import METRICS_FILE, read_new_metrics


class State(StrEnum):
    """What a run does: only a `RUNNING` one will write more."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class WatchedRun:
    """A run's metrics so far.

    Args:
        num_epochs: that the recipe asks for; None if `config.json` does not tell.
        batch_size: of all ranks together; None likewise.
        lines: those of `metrics.jsonl`.
    """

    path: Path
    num_epochs: int | None = None
    batch_size: int | None = None
    state: State = State.RUNNING
    reason: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    _inode: int | None = None
    _offset: int = 0

    @classmethod
    def open(cls, path: Path) -> "WatchedRun":
        """Returns the run of a folder, as it is now.

        Raises:
            ConfigError: there is no such folder, or it holds no run.
        """
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file: give the folder of a run, or all of them with runs/*/")
        if not path.is_dir():
            raise ConfigError(f"{path} does not exist (yet): give the folder that the run's second line names")
        try:
            recipe = json.loads(read_regular(path / "config.json"))["fingerprint"]["recipe"]
            run = cls(path, recipe.get("epochs"), recipe.get("global_batch_size"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise no_run(path) from None
        run.refresh()
        return run

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def refresh(self) -> None:
        """Reads what is new.

        A run that continues from a checkpoint writes its metrics anew, without those after the checkpoint. Then `lines`
        begins anew, too.
        """
        self.state, self.reason = state_of(self.path)  # first: after an end there are no more lines
        try:
            read = read_new_metrics(self.path, self._offset, self._inode)
        except OSError:  # not written yet
            return
        if read.is_anew:
            self.lines = []
        self._offset, self._inode = read.offset, read.inode
        self.lines += read.lines

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Returns the lines of steps, of epochs, or of the result."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def epoch(self) -> int:
        """The newest line's epoch, counted from 1; 0 before the first line."""
        return max((line["epoch"] for line in self.lines), default=0)

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint: that of an interrupted run may be later than its last line."""
        names = (path.name.removeprefix("step-") for path in (self.path / CHECKPOINTS).glob("step-*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    @property
    def num_steps(self) -> int | None:
        """The steps of the whole run: as lines of steps tell it, or by the epochs so far; None if nothing tells."""
        for line in reversed(self.lines):
            if "num_steps" in line:
                return int(line["num_steps"])
            if line["kind"] == "epoch" and self.num_epochs:
                return int(line["step"] / line["epoch"] * self.num_epochs)
        return None

    @property
    def images_per_second(self) -> float | None:
        """The training's speed: of the last steps, or of all epochs if their steps are too few for lines."""
        speed = self.newest("step", "images_per_second")
        if speed is None and self.batch_size:
            seconds, step = self.newest("epoch", "seconds"), self.newest("epoch", "step")
            speed = step * self.batch_size / seconds if seconds and step else None
        return speed

    @property
    def seconds_left(self) -> float | None:
        """An estimate by the time between the first line and the last."""
        if self.num_steps is None or len(self.lines) < 2:
            return None
        first, last = self.lines[0], self.lines[-1]
        steps, seconds = last["step"] - first["step"], last.get("time", 0) - first.get("time", 0)
        return seconds / steps * max(0, self.num_steps - last["step"]) if steps > 0 else None

    def newest(self, kind: str, name: str) -> float | None:
        """Returns the newest value of a figure in lines of a kind."""
        values = [line[name] for line in self.of_kind(kind) if line.get(name) is not None]
        return float(values[-1]) if values else None


def state_of(folder: Path) -> tuple[State, str]:
    """Returns what a folder's run does, and why it has failed or how it continues."""
    # The lock before the result: the run writes its result while it holds the lock.
    is_running = is_locked(folder / LOCK_FILE)
    if (folder / RESULT_FILE).exists():
        return State.FINISHED, ""
    if is_running:
        return State.RUNNING, ""
    message = _failure(folder)
    return (State.FAILED, message) if message else (State.STOPPED, "the same command with --run-dir continues it")


def _failure(folder: Path) -> str:
    """Returns the message of the last failure; empty if there is none, or if the run has continued since."""
    path, metrics = folder / FAILURE_FILE, folder / METRICS_FILE
    try:
        failed_at = path.stat().st_mtime
        message = str(json.loads(read_regular(path))["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    has_continued = metrics.exists() and metrics.stat().st_mtime > failed_at
    return "" if has_continued else message.partition("\n")[0]
