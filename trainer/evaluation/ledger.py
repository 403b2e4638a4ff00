"""The ledger records every evaluation on a test set. No other module opens test images.

An accuracy on a test set estimates the accuracy on new images only while nothing was chosen by it. So
`evaluate_and_record` appends each evaluation to `ledger.jsonl` in the folder that holds the runs: test set, weights,
configuration, time and result. A second evaluation of the same weights shows nothing new and is not counted.

The file is append-only JSON lines. Each line carries the SHA-256 of its entry, so that a changed line is an error.
A removed line leaves no trace here; `describe_missing` tells where a run knew more evaluations than the ledger holds.
Ledgers of several machines merge by concatenation, in any order: entries are sorted by time, duplicates count once.

The images of a test set identify it, as the network gets them, in any order: other training images, other names of
files or classes, and corrected labels leave it the same set. Another image size, or another tenth of a folder without
test images of its own, makes it another one.
"""

import datetime
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from trainer.data import Dataset, Images
from trainer.data.test_set import load_test_set
from trainer.errors import CheckpointError, DivergenceError, reading, writing
from trainer.evaluation.entry import EvaluatedWeights, LedgerEntry
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import describe_accuracy
from trainer.evaluation.recall import describe_balance
from trainer.evaluation.views import describe_with_views, is_headline_averaged
from trainer.files import append_line, locked, read_lines
from trainer.recipes import TestTimeViews


@dataclass(frozen=True, slots=True)
class RecordedEvaluation:
    """One evaluation on a test set, and its place among all of them in the workspace.

    Args:
        number: counted from 1, by time.
        num_evaluations: evaluations that the ledger holds for this test set.
        is_repeated: the ledger had this evaluation already.
    """

    entry: LedgerEntry
    number: int
    num_evaluations: int
    is_repeated: bool

    def describe(self, ledger: Path, *, views: TestTimeViews, recall_by_class: dict[str, float]) -> str:
        """Returns the accuracy and its place in the ledger as text, for the user.

        Args:
            ledger: the ledger's path.
            views: the recipe's.
            recall_by_class: empty if unknown.
        """
        entry = self.entry
        accuracy = describe_accuracy(entry.num_errors, entry.num_images, number=self.number)
        with_views = describe_with_views(entry.num_errors_with_views, entry.num_images, views)
        balance = describe_balance(entry.accuracy, recall_by_class)
        place = f"evaluation {self.number} of {self.num_evaluations} on this test set in {ledger}"
        return f"{accuracy}{with_views}{balance}, {place}"


class Ledger:
    """The evaluations on test sets of one workspace (a folder of runs)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, dataset_sha256: str, test_sha256: str | None = None) -> list[LedgerEntry]:
        """Returns all evaluations on the test set of a data set, oldest first.

        Entries of other data sets that share its test images are among them.

        Args:
            test_sha256: of its test images, where the ledger may have no entry of this data set yet.
        """
        entries = self.all_entries()
        tests = {e.test_sha256 for e in entries if e.dataset_sha256 == dataset_sha256} | {test_sha256}
        # Old entries lack the digest of the test images; later entries of the same data set have it.
        datasets = {dataset_sha256} | {e.dataset_sha256 for e in entries if e.test_sha256 in tests - {None}}
        return _distinct(entry for entry in entries if entry.dataset_sha256 in datasets)

    def all_entries(self) -> list[LedgerEntry]:
        """Returns all entries, oldest first, without a last line that a kill has cut short. Duplicates are not removed.

        Raises:
            CheckpointError: the file cannot be read, or a line is damaged or was changed.
        """
        with reading(self.path):
            lines = enumerate(read_lines(self.path), start=1)
        entries = [_parse(line, f"{self.path}, line {number},") for number, line in lines if line.strip()]
        return sorted(entries, key=lambda entry: entry.time or "")

    def describe_missing(self, dataset_sha256: str, test_sha256: str | None, run: Path, counted: int) -> str:
        """Returns text for the user if the ledger lacks evaluations on a test set that a run counted, else ""."""
        held = len(self.entries(dataset_sha256, test_sha256))
        if held >= counted:
            return ""
        return (
            f"{self.path} holds {held} evaluation{'s' if held != 1 else ''} on this test set, but {run} counted "
            f"{counted}: entries are missing; restore the ledger, or append the one that the run was recorded in"
        )

    def of_setting(self, setting_sha256: str) -> list[LedgerEntry]:
        """Returns all evaluations of a setting (a configuration without its seed), oldest first, each of other weights.

        A seed may have several: the number of ranks and the kind of machine change the rounding, and so the weights.
        Of weights that version 0.1 evaluated with several views, and a later one with one view, the latter counts.
        """
        entries = [entry for entry in self.all_entries() if entry.setting_sha256 == setting_sha256]
        of_one_view = {entry.weights_sha256 for entry in entries if entry.num_errors_with_views is not None}
        return _distinct(
            entry
            for entry in entries
            if entry.num_errors_with_views is not None or entry.weights_sha256 not in of_one_view
        )

    def counts_by_dataset(self) -> dict[str, int]:
        """Returns the number of evaluations on each data set, by its name and the first digits of its digest."""
        datasets: dict[str, list[LedgerEntry]] = {}
        for entry in self.all_entries():
            datasets.setdefault(f"{entry.dataset or '?'} {entry.dataset_sha256[:8]}", []).append(entry)
        return {name: len(_distinct(entries)) for name, entries in datasets.items()}

    def record(self, entry: LedgerEntry) -> RecordedEvaluation:
        """Appends an evaluation, unless the ledger has the same result of the same weights, and returns its place.

        After a correction of labels the same weights have another result, which is another evaluation.

        Raises:
            CheckpointError: the ledger is damaged or cannot be written.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Two runs may end at the same time.
            with locked(self.path, print, f"waiting for another process that writes {self.path}"):
                known = self.entries(entry.dataset_sha256, entry.test_sha256)
                for number, earlier in enumerate(known, start=1):
                    if earlier.result == entry.result:
                        return RecordedEvaluation(earlier, number, len(known), is_repeated=True)
                append_line(self.path, entry.to_line())
        return RecordedEvaluation(entry, len(known) + 1, len(known) + 1, is_repeated=False)

    def find(self, dataset_sha256: str, weights_sha256: str, views: TestTimeViews) -> RecordedEvaluation | None:
        """Returns the recorded evaluation of these weights on one view of each image, if there is one.

        Args:
            views: the recipe's. With several, version 0.1 recorded their mean alone; that is no evaluation on one view.
        """
        entries = self.entries(dataset_sha256)
        for number, entry in enumerate(entries, start=1):
            is_averaged = is_headline_averaged(views, entry.num_errors_with_views)
            if entry.weights_sha256 == weights_sha256 and not is_averaged:
                return RecordedEvaluation(entry, number, len(entries), is_repeated=True)
        return None


def evaluate_and_record(
    ledger: Ledger,
    dataset: Dataset,
    weights: EvaluatedWeights,
    evaluate_images: Callable[[Images], Evaluation],
    *,
    is_main: bool,
) -> tuple[Images, Evaluation, RecordedEvaluation | None]:
    """Evaluates on the test set and records it in the ledger. All ranks call this; only the main one writes.

    Args:
        weights: the weights that `evaluate_images` evaluates.

    Returns:
        The test images, their evaluation and, on the main rank, its place in the ledger.

    Raises:
        DivergenceError: as in `evaluate`.
    """
    images = load_test_set(dataset)
    try:
        evaluation = evaluate_images(images)
    except DivergenceError as error:
        raise DivergenceError(f"no test accuracy: {error} of the test set; nothing is recorded") from error
    if not is_main:
        return images, evaluation, None
    entry = LedgerEntry(
        # To the microsecond, so that the order of merged ledgers does not depend on that of the files.
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        dataset=dataset.name,
        dataset_sha256=dataset.sha256,
        test_sha256=images_sha256(images),
        **asdict(weights),
        accuracy=evaluation.accuracy,
        num_errors=evaluation.num_errors,
        num_images=evaluation.num_images,
        accuracy_with_views=evaluation.accuracy_with_views,
        num_errors_with_views=evaluation.num_errors_with_views,
    )
    return images, evaluation, ledger.record(entry)


def images_sha256(images: Images) -> str:
    """Returns the SHA-256 of the number, shape and digests of images, the same for every order of them."""
    digest = hashlib.sha256(str([len(images), *images.shape]).encode())
    for each in sorted(images.digests(torch.arange(len(images)))):
        digest.update(each)
    return digest.hexdigest()


def _parse(line: str, place: str) -> LedgerEntry:
    try:
        return LedgerEntry.from_line(line)
    except ValueError as error:
        raise CheckpointError(f"{place} {error}") from error


def _distinct(entries: Iterable[LedgerEntry]) -> list[LedgerEntry]:
    """Returns the entries of one test set without duplicates."""
    first: dict[tuple[str, int, int, int | None], LedgerEntry] = {}
    for entry in entries:
        first.setdefault(entry.result, entry)
    return list(first.values())
