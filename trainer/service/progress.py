"""Follows a run's `metrics.jsonl` while the run writes it."""

import math
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

from trainer.paths import CHECKPOINTS
from trainer.records.metrics import read_new_metrics

STAGES = 200
"""Of a number of steps until it is 2.7 times as large."""
MAX_LINES = 200
"""Of one reading; those of steps in between are left out."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a reader is, and the newest figures.

    Args:
        offset: bytes of the file that were read.
        step: the newest step.
        epoch: the newest epoch that has ended.
        figures: the newest value of each name, such as `train_loss`.
        stopped_at: the step that was done, or saved, when an attempt was last stopped from outside.
        num_stalls: attempts in a row that were stopped so without coming any further than the one before.
    """

    offset: int = 0
    step: int = 0
    epoch: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    stopped_at: int = 0
    num_stalls: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**values) if values else cls()

    def advanced(self, run_folder: Path) -> tuple[Self, list[dict[str, Any]]]:
        """Reads the lines that are new.

        A run that goes on from a checkpoint writes the file anew; lines up to the step that is known are no news.

        Returns:
            The progress after them, and the lines: every epoch and result, and of steps the last one that was read
            if they have grown by about half a percent, so that a training of a million steps gives a thousand events.
        """
        try:
            read = read_new_metrics(run_folder, self.offset)
        except OSError:
            return self, []
        new = [line for line in read.lines if self._is_news(line)]
        newest = [line for line, after in zip_longest(new, new[1:]) if not _is_covered(line, after)]
        figures = dict(self.figures)
        for line in newest:
            figures |= line
        step = max([self.step, *(line["step"] for line in newest)])
        epoch = max([self.epoch, *(line["epoch"] for line in newest if line["kind"] == "epoch")])
        told = [line for line in newest if line["kind"] != "step" or _stage(line["step"]) > _stage(self.step)]
        return replace(self, offset=read.offset, step=step, epoch=epoch, figures=figures), told[-MAX_LINES:]

    def stopped(self, run_folder: Path) -> Self:
        """Returns the progress after an attempt that was stopped from outside."""
        step = max(self.step, _saved_step(run_folder))
        return replace(self, stopped_at=step, num_stalls=self.num_stalls + 1 if step <= self.stopped_at else 0)

    def _is_news(self, line: dict[str, Any]) -> bool:
        match line["kind"]:
            case "step":
                return bool(line["step"] > self.step)
            case "epoch":
                return bool(line["epoch"] > self.epoch)
        return bool(line["step"] >= self.step)


def _saved_step(run_folder: Path) -> int:
    """Returns the step of the newest checkpoint; the metrics have one step of many."""
    names = [path.name.removeprefix("step-") for path in run_folder.glob(f"{CHECKPOINTS}/step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _stage(step: int) -> int:
    return int(STAGES * math.log(step)) if step > 0 else -1


def _is_covered(line: dict[str, Any], after: dict[str, Any] | None) -> bool:
    return line["kind"] == "step" and after is not None and after["kind"] == "step"
