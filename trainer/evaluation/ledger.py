"""The ledger records every evaluation on a test set. No other module opens test images.

An accuracy on a test set estimates the accuracy on new images only while nothing was chosen by it. So
`evaluate_and_record` appends each evaluation to `ledger.jsonl` in the folder that holds the runs: test set, weights,
configuration, time and result. A second evaluation of the same weights shows nothing new and is not counted.

The file is append-only JSON lines. Each line carries the SHA-256 of its entry, so that a changed line is an error.
A removed line leaves no trace here; `trainer.compare` notices where a run knew more evaluations than the ledger holds.
Ledgers of several machines merge by concatenation, in any order: entries are sorted by time, duplicates count once.

The images of a test set identify it, as the network gets them, in any order: other training images, other names of
files or classes, and corrected labels leave it the same set. Another image size, or another tenth of a folder without
test images of its own, makes it another one.
"""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.data import Dataset, ImageSet
from trainer.data.folder.duplicates import image_digests
from trainer.data.test_set import load_test_set
from trainer.errors import CheckpointError, writing
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import describe_accuracy
from trainer.files import append_line, locked, read_lines

_RESULT = ("weights_sha256", "num_errors", "num_images")
"""Entries of one test set that agree in these are one evaluation, recorded twice or on two machines."""
_REQUIRED = {"dataset_sha256", "accuracy", *_RESULT}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEvaluation:
    """One evaluation on a test set, and its place among all of them in the workspace.

    Args:
        number: counted from 1, by time.
        num_evaluations: how many the ledger holds for this test set.
        test_sha256: of the test images; of the data set where an old ledger has no digest of the images.
        is_repeated: the ledger had this evaluation already.
    """

    number: int
    num_evaluations: int
    accuracy: float
    num_errors: int
    num_images: int
    test_sha256: str
    is_repeated: bool

    def describe(self, ledger: Path, *, num_views: int) -> str:
        """Returns the accuracy and its place in the ledger at that path as text, for the user."""
        accuracy = describe_accuracy(self.num_errors, self.num_images, num_views=num_views, number=self.number)
        return f"{accuracy}, evaluation {self.number} of {self.num_evaluations} on this test set in {ledger}"


class Ledger:
    """The evaluations on test sets of one workspace (a folder of runs)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, dataset_sha256: str, test_sha256: str | None = None) -> list[dict[str, Any]]:
        """Returns all evaluations on the test set of a data set, oldest first.

        Entries of other data sets that share its test images are among them.

        Args:
            test_sha256: of its test images, where the ledger may have no entry of this data set yet.
        """
        entries = self.all_entries()
        known = {e["test_sha256"] for e in entries if e["dataset_sha256"] == dataset_sha256 and "test_sha256" in e}
        tests = known | {test_sha256}
        # Old entries lack the digest of the test images; later entries of the same data set have it.
        datasets = {dataset_sha256} | {e["dataset_sha256"] for e in entries if e.get("test_sha256", "") in tests}
        return _distinct(entry for entry in entries if entry["dataset_sha256"] in datasets)

    def all_entries(self) -> list[dict[str, Any]]:
        """Returns all entries, oldest first, without a last line that a kill has cut short. Duplicates are not removed.

        Raises:
            CheckpointError: a line is damaged or was changed.
        """
        lines = enumerate(read_lines(self.path), start=1)
        entries = [_parse(line, f"{self.path}, line {number},") for number, line in lines if line.strip()]
        return sorted(entries, key=lambda entry: str(entry.get("time", "")))

    def of_setting(self, setting_sha256: str) -> list[dict[str, Any]]:
        """Returns all evaluations of a setting (a configuration without its seed), oldest first, each of other weights.

        A seed may have several: the number of ranks and the kind of machine change the rounding, and so the weights.
        """
        return _distinct(entry for entry in self.all_entries() if entry.get("setting_sha256") == setting_sha256)

    def counts_by_dataset(self) -> dict[str, int]:
        """Returns the number of evaluations on each data set, by its name and the first digits of its digest."""
        datasets: dict[str, list[dict[str, Any]]] = {}
        for entry in self.all_entries():
            datasets.setdefault(f"{entry.get('dataset', '?')} {entry['dataset_sha256'][:8]}", []).append(entry)
        return {name: len(_distinct(entries)) for name, entries in datasets.items()}

    def record(self, entry: dict[str, Any]) -> RecordedEvaluation:
        """Appends an evaluation, unless the ledger has the same result of the same weights, and returns its place.

        After a correction of labels the same weights have another result, which is another evaluation.

        Raises:
            CheckpointError: the ledger is damaged or cannot be written.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Two runs may end at the same time.
            with locked(self.path, print, f"waiting for another process that writes {self.path}"):
                known = self.entries(entry["dataset_sha256"], entry.get("test_sha256"))
                for number, earlier in enumerate(known, start=1):
                    if _result(earlier) == _result(entry):
                        return _recorded(earlier, number, len(known), is_repeated=True)
                # ASCII, so that names of folders that are not UTF-8 survive too.
                append_line(self.path, json.dumps({**entry, "sha256": _digest(entry)}))
        return _recorded(entry, len(known) + 1, len(known) + 1, is_repeated=False)

    def find(self, dataset_sha256: str, weights_sha256: str) -> RecordedEvaluation | None:
        """Returns the recorded evaluation of these weights, if there is one."""
        entries = self.entries(dataset_sha256)
        for number, entry in enumerate(entries, start=1):
            if entry["weights_sha256"] == weights_sha256:
                return _recorded(entry, number, len(entries), is_repeated=True)
        return None


def evaluate_and_record(
    ledger: Ledger,
    dataset: Dataset,
    run: dict[str, str | int],
    evaluate_images: Callable[[ImageSet], Evaluation],
    *,
    is_main: bool,
) -> tuple[ImageSet, Evaluation, RecordedEvaluation | None]:
    """Evaluates on the test set and records it in the ledger. All ranks call this; only the main one writes.

    Args:
        run: what is evaluated: `weights_sha256`, `config_sha256`, `setting_sha256`, `seed`, `recipe`.

    Returns:
        The test images, their evaluation and, on the main rank, its place in the ledger.
    """
    images = load_test_set(dataset)
    evaluation = evaluate_images(images)
    if not is_main:
        return images, evaluation, None
    entry = {
        # To the microsecond, so that the order of merged ledgers does not depend on that of the files.
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        "test_sha256": images_sha256(images.images),
        **run,
        "accuracy": evaluation.accuracy,
        "num_errors": evaluation.num_errors,
        "num_images": evaluation.num_images,
    }
    return images, evaluation, ledger.record(entry)


def images_sha256(images: torch.Tensor) -> str:
    """Returns the SHA-256 of the shape and pixels of images uint8 `[N, C, H, W]`, the same for every order of them."""
    digest = hashlib.sha256(str(list(images.shape)).encode())
    for each in sorted(image_digests(images)):
        digest.update(each)
    return digest.hexdigest()


def _parse(line: str, place: str) -> dict[str, Any]:
    """Returns the entry of a line, without its digest and the link to the line before that old ledgers have."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{place} is not JSON: repair it by hand, or restore the ledger from a copy") from error
    if not isinstance(entry, dict) or not entry.keys() >= _REQUIRED:
        raise CheckpointError(f"{place} is not an entry of a ledger: remove it, or restore the ledger from a copy")
    entry.pop("previous", None)
    if entry.pop("sha256", None) not in (None, _digest(entry)):
        raise CheckpointError(f"{place} was changed after it was written: restore the ledger from a copy")
    return entry


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _result(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in _RESULT)


def _distinct(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the entries of one test set without duplicates."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in entries:
        first.setdefault(_result(entry), entry)
    return list(first.values())


def _recorded(entry: dict[str, Any], number: int, total: int, *, is_repeated: bool) -> RecordedEvaluation:
    return RecordedEvaluation(
        number=number,
        num_evaluations=total,
        accuracy=entry["accuracy"],
        num_errors=entry["num_errors"],
        num_images=entry["num_images"],
        test_sha256=entry.get("test_sha256", entry["dataset_sha256"]),
        is_repeated=is_repeated,
    )
