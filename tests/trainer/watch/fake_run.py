"""A run folder that a test writes as the trainer does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.files import locked, write_json
from trainer.paths import FAILURE_FILE, LOCK_FILE, RESULT_FILE
from trainer.records.metrics import METRICS_FILE


class FakeRun:
    """Writes a run of 45 steps an epoch."""

    def __init__(self, path: Path, epochs: int = 3) -> None:
        self.path = path
        path.mkdir(parents=True)
        recipe = {"name": "mnist", "epochs": epochs, "global_batch_size": 100}
        write_json(path / "config.json", {"fingerprint": {"recipe": recipe}})

    @contextmanager
    def training(self) -> Iterator[None]:
        """Context in which the run's process lives."""
        with locked(self.path / LOCK_FILE, print, ""):
            yield

    def write(self, kind: str, step: int, epoch: int, **values: float) -> None:
        line = {"kind": kind, "step": step, "epoch": epoch, "time": 1_000.0 + step, **values}
        self.write_text(json.dumps(line) + "\n")

    def write_text(self, text: str) -> None:
        with (self.path / METRICS_FILE).open("a") as file:
            file.write(text)

    def end_epoch(self, epoch: int) -> None:
        """Writes an epoch whose figures are its number / 10."""
        names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
        self.write("epoch", 45 * epoch, epoch, **dict.fromkeys(names, epoch / 10), seconds=1.0 * epoch)

    def finish(self, **values: Any) -> None:
        self.write("result", 135, 3, val_accuracy=0.3, test_accuracy=0.99)
        write_json(self.path / RESULT_FILE, {"test_accuracy": 0.99, **values})

    def fail(self, message: str) -> None:
        write_json(self.path / FAILURE_FILE, {"message": message})
