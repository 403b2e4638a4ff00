"""The one door to a test set, and the book in which every passing through it is written.

An accuracy on a test set is an estimate of the accuracy on new images only while nothing was chosen by it. So each
look is appended to `ledger.jsonl` in the folder that holds the runs: which test set, which weights, which
configuration, when, and what was seen. A second look with the same weights shows nothing new and is not counted.
Each line carries the digest of the one before it, and `ledger.head` the last one's, so that a line that was changed or
taken out is noticed. That is against mistakes and temptation: whoever writes both files anew, or deletes both, is not.

A test set is known by its images as they are fed to a network, in whatever order: other training images beside them,
other names of files and classes or corrected labels do not make it another one. The same photographs at another image
size, or another tenth of a folder that has no test images of its own, do.
"""

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.data import Dataset, ImageSet
from trainer.data.folder.duplicates import image_digests
from trainer.data.test_set import load_test_set
from trainer.errors import CheckpointError, writing
from trainer.evaluation.evaluate import Evaluation
from trainer.files import append_line, locked, read_lines, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at a test set.

    Args:
        number: which look at this test set it was in this workspace, counted from 1.
        num_looks: how many the workspace holds now.
        test_sha256: of the test images; of the data set in ledgers of before that digest.
        is_repeated: these weights had been looked at before, so that it was not counted again.
    """

    number: int
    num_looks: int
    accuracy: float
    num_errors: int
    num_images: int
    test_sha256: str
    is_repeated: bool


class Ledger:
    """The looks at test sets of one workspace (a folder of runs)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head_path = path.with_suffix(".head")

    def entries(self, dataset_sha256: str, test_sha256: str | None = None) -> list[dict[str, Any]]:
        """All looks so far at the test set of that data set, oldest first, through whatever other data set it was.

        Args:
            test_sha256: of its test images, where no look through this data set may have told it yet.
        """
        entries = self.all_entries()
        known = {e["test_sha256"] for e in entries if e["dataset_sha256"] == dataset_sha256 and "test_sha256" in e}
        tests = known | {test_sha256}
        # Lines of before that digest have none: what they looked at is known by later lines of the same data set.
        datasets = {dataset_sha256} | {e["dataset_sha256"] for e in entries if e.get("test_sha256", "") in tests}
        return [entry for entry in entries if entry["dataset_sha256"] in datasets]

    def all_entries(self) -> list[dict[str, Any]]:
        """All looks at any test set, oldest first; a last line that a kill has cut short is none.

        Raises:
            CheckpointError: a line is damaged, does not follow from the one before it, or is missing at the end.
        """
        entries: list[dict[str, Any]] = []
        previous = ""
        head = self._head()  # before the lines, which may become more meanwhile
        lines = read_lines(self.path)
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise CheckpointError(f"{self.path}, line {number}, is not JSON: mend the ledger by hand") from error
            # Ledgers of before the chain have lines without a link, but never behind one that has it.
            has_link = "previous" in entry
            if entry.get("previous", previous) != previous or (not has_link and entries and "previous" in entries[-1]):
                raise CheckpointError(
                    f"{self.path}, line {number}, does not follow from the line before it: lines were changed or taken "
                    "out, so that the looks cannot be counted any more; put the ledger back as it was"
                )
            entries.append(entry)
            previous = _digest(line)
        if head and (len(lines) < head["lines"] or _digest(lines[head["lines"] - 1]) != head["sha256"]):
            raise CheckpointError(
                f"{self.path} does not end as {self._head_path.name} says, at line {head['lines']}: lines were changed "
                "or taken out, so that the looks cannot be counted any more; put the ledger back as it was"
            )
        return entries

    def of_setting(self, setting_sha256: str) -> list[dict[str, Any]]:
        """All looks with this setting (the same configuration but for the seed), oldest first, each of other weights.

        A seed may have several: the number of ranks, or the kind of machine, changes the rounding and so the weights.
        """
        return [entry for entry in self.all_entries() if entry.get("setting_sha256") == setting_sha256]

    def looks_by_dataset(self) -> dict[str, int]:
        """How many looks at the test set of each data set, by name and the digest's first digits."""
        names = [f"{entry.get('dataset', '?')} {entry['dataset_sha256'][:8]}" for entry in self.all_entries()]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def record(self, entry: dict[str, Any]) -> Look:
        """Append a look, unless one that saw the same of the same weights stands there; either way, say which it is.

        Where labels have been corrected since, the same weights are seen to do otherwise.

        Raises:
            CheckpointError: the ledger cannot be written, or is damaged.
        """
        with writing(self.path):
            return self._record(entry)

    def _record(self, entry: dict[str, Any]) -> Look:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Two runs may end at the same time.
        with locked(self.path, print, f"waiting for another process that writes {self.path}"):
            earlier = self.entries(entry["dataset_sha256"], entry.get("test_sha256"))
            for number, known in enumerate(earlier, start=1):
                if all(known[mark] == entry[mark] for mark in ("weights_sha256", "num_errors", "num_images")):
                    return _look(known, number, len(earlier), is_repeated=True)
            lines = read_lines(self.path)
            linked = {**entry, "previous": _digest(lines[-1]) if lines else ""}
            line = json.dumps(linked, ensure_ascii=False)
            append_line(self.path, line)
            write_json(self._head_path, {"lines": len(lines) + 1, "sha256": _digest(line)})
        return _look(entry, len(earlier) + 1, len(earlier) + 1, is_repeated=False)

    def find(self, dataset_sha256: str, weights_sha256: str) -> Look | None:
        """The recorded look with these weights, if there was one."""
        entries = self.entries(dataset_sha256)
        for number, entry in enumerate(entries, start=1):
            if entry["weights_sha256"] == weights_sha256:
                return _look(entry, number, len(entries), is_repeated=True)
        return None

    def _head(self) -> dict[str, Any]:
        """How many lines there were after the last look, and the last one's digest; empty where none was written.

        It may be behind (a crash between the two, or a trainer of before it), never ahead.
        """
        try:
            head: dict[str, Any] = json.loads(self._head_path.read_text())
            return {"lines": int(head["lines"]), "sha256": str(head["sha256"])}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._head_path} is damaged: put it back as it was") from error


def look_at_test_set(
    ledger: Ledger,
    dataset: Dataset,
    run: dict[str, str | int],
    evaluate_images: Callable[[ImageSet], Evaluation],
    *,
    is_main: bool,
) -> tuple[ImageSet, Evaluation, Look | None]:
    """Evaluate on the test set and write it into the ledger. All ranks call this; only the main one writes.

    Args:
        run: what is evaluated: `weights_sha256`, `config_sha256`, `setting_sha256`, `seed`, `recipe`.

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
        "test_sha256": images_sha256(images.images),
        **run,
        "accuracy": evaluation.accuracy,
        "num_errors": evaluation.num_errors,
        "num_images": evaluation.num_images,
    }
    return images, evaluation, ledger.record(entry)


def images_sha256(images: torch.Tensor) -> str:
    """SHA-256 over the shape and the pixels of images uint8 `[N, C, H, W]`, the same in every order of the images."""
    digest = hashlib.sha256(str(list(images.shape)).encode())
    for each in sorted(image_digests(images)):
        digest.update(each)
    return digest.hexdigest()


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _look(entry: dict[str, Any], number: int, num_looks: int, *, is_repeated: bool) -> Look:
    return Look(
        number=number,
        num_looks=num_looks,
        accuracy=entry["accuracy"],
        num_errors=entry["num_errors"],
        num_images=entry["num_images"],
        test_sha256=entry.get("test_sha256", entry["dataset_sha256"]),
        is_repeated=is_repeated,
    )
