"""The one door to a test set, and the book in which every passing through it is written.

An accuracy on a test set is an estimate of the accuracy on new images only while nothing was chosen by it. So each
look is appended to `ledger.jsonl` in the folder that holds the runs: which test set, which weights, which
configuration, when, and what was seen. A second look with the same weights shows nothing new and is not counted.
"""

import datetime
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import Dataset, ImageSet
from trainer.data.test_set import load_test_set
from trainer.errors import CheckpointError
from trainer.evaluate import Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at a test set.

    Args:
        number: which look at this test set it was in this workspace, counted from 1.
        is_repeated: these weights had been looked at before, so that it was not counted again.
    """

    number: int
    accuracy: float
    num_errors: int
    num_images: int
    is_repeated: bool


class Ledger:
    """The looks at test sets of one workspace (a folder of runs)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, dataset_sha256: str) -> list[dict[str, Any]]:
        """All looks at this test set so far, oldest first."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(f"{self.path}, line {number}, is not JSON: mend the ledger by hand") from error
        return [entry for entry in entries if entry["dataset_sha256"] == dataset_sha256]

    def record(self, entry: dict[str, Any]) -> Look:
        """Append a look, unless one with the same weights and data set stands there; either way, say which it is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two runs may end at the same time
            earlier = self.entries(entry["dataset_sha256"])
            for number, known in enumerate(earlier, start=1):
                if known["weights_sha256"] == entry["weights_sha256"]:
                    return _look(known, number, is_repeated=True)
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return _look(entry, len(earlier) + 1, is_repeated=False)

    def find(self, dataset_sha256: str, weights_sha256: str) -> Look | None:
        """The recorded look with these weights, if there was one."""
        for number, entry in enumerate(self.entries(dataset_sha256), start=1):
            if entry["weights_sha256"] == weights_sha256:
                return _look(entry, number, is_repeated=True)
        return None


def look_at_test_set(
    ledger: Ledger,
    dataset: Dataset,
    run: dict[str, str],
    evaluate_images: Callable[[ImageSet], Evaluation],
    *,
    is_main: bool,
) -> tuple[ImageSet, Evaluation, Look | None]:
    """Evaluate on the test set and write it into the ledger. All ranks call this; only the main one writes.

    Args:
        run: `weights_sha256`, `config_sha256` and `recipe` of what is evaluated.

    Returns:
        The test images, what the model made of them, and, on the main rank, which look it was.
    """
    images = load_test_set(dataset)
    evaluation = evaluate_images(images)
    if not is_main:
        return images, evaluation, None
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        **run,
        "accuracy": evaluation.accuracy,
        "num_errors": evaluation.num_errors,
        "num_images": evaluation.num_images,
    }
    return images, evaluation, ledger.record(entry)


def _look(entry: dict[str, Any], number: int, *, is_repeated: bool) -> Look:
    return Look(
        number=number,
        accuracy=entry["accuracy"],
        num_errors=entry["num_errors"],
        num_images=entry["num_images"],
        is_repeated=is_repeated,
    )
