"""The results of a run as one record: `result.json`."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from convoy.named_files import read_regular
from trainer.errors import reading
from trainer.files import write_json
from trainer.typed_values import convert_fields

_LEFT_OUT_IF_NONE = (
    "num_validation",
    "val_accuracy_with_views",
    "test_accuracy_with_views",
    "test_errors_with_views",
    "test_accuracy_of_seeds",
    "num_averaged_seeds",
    "stacked",
    "best_epoch",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A complete run's figures and where they come from. Fields with a default are missing in older files.

    Args:
        dataset_notes: lines printed when a folder of images was opened.
        test_sha256: digest of the test images; None in files from before that digest.
        model: the recipe's network.
        epochs: trained epochs; fewer than the recipe's after an early end.
        best_epoch: the epoch with the best validation result, counted from 1, whose weights these are if the recipe
            keeps the best; None if the recipe has no use for it.
        train_seconds: spent in training steps; validation and saving not counted.
        num_validation: validation images; 0 if all training images were trained on. None in older files.
        val_accuracy: between 0 and 1, as are all accuracies; None without validation images. Headline figures are of
            one view of each image, as the exported model computes them; those of version 0.1 average the views.
        val_accuracy_with_views: the mean over the recipe's test-time views, where it has several; the same for
            `test_accuracy_with_views` and `test_errors_with_views`.
        test_interval: Wilson interval at the level of `test_look`.
        balanced_accuracy: mean recall over the classes that have test images.
        recall_by_class: of the test images of each class; classes without any are left out.
        warnings: signs that the network learns nothing useful, as `evaluation.baseline` finds them at its end.
        test_look: the number of this evaluation among those on this test set in the workspace, counted from 1.
        num_test_looks: evaluations on this test set in the workspace at the end of the run.
        test_accuracy_of_seeds: for each seed of this setting in the ledger, the test accuracy of each of its weights;
            None in a member of a study of seeds, whose page has them.
        num_averaged_seeds: number of these accuracies that version 0.1 took as means over views; None if none.
        looks_by_dataset: evaluations on the test set of each data set in the workspace.
        exported: folder of the version in the model repository.
        machine: from `hardware.describe`.
        stacked: number of members of a study of seeds that were trained together; None elsewhere.
    """

    recipe: str
    dataset: str
    dataset_sha256: str
    dataset_notes: tuple[str, ...] = ()
    test_sha256: str | None = None
    model: str
    num_parameters: int
    world_size: int
    virtual_shards: int | None = None
    device: str
    precision: str
    seed: int
    epochs: int
    best_epoch: int | None = None
    steps: int
    global_batch_size: int
    train_seconds: float
    images_per_second: float
    num_validation: int | None = None
    val_accuracy: float | None
    val_accuracy_with_views: float | None = None
    test_accuracy: float
    test_accuracy_with_views: float | None = None
    test_errors: int
    test_errors_with_views: int | None = None
    num_test: int
    test_interval: tuple[float, float]
    balanced_accuracy: float | None = None
    recall_by_class: dict[str, float] | None = None
    warnings: tuple[str, ...] = ()
    test_look: int
    num_test_looks: int | None = None
    test_accuracy_of_seeds: dict[int, list[float]] | None = None
    num_averaged_seeds: int | None = None
    looks_by_dataset: dict[str, int] | None = None
    weights_sha256: str
    exported: str | None
    machine: dict[str, str | int]
    stacked: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `result.json`, in the order of the fields."""
        return {
            name: value for name, value in asdict(self).items() if value is not None or name not in _LEFT_OUT_IF_NONE
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the result in the content of a `result.json`; fields of later versions are ignored.

        Raises:
            ValueError: a field is missing that every version writes, or one is of another type.
        """
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if (by_seed := known.get("test_accuracy_of_seeds")) is not None:
            known["test_accuracy_of_seeds"] = {int(seed): accuracies for seed, accuracies in by_seed.items()}
        return cls(**convert_fields(cls, known))

    def write(self, path: Path) -> None:
        """Writes the result.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Returns the result in a file, or None if there is no file.

        Raises:
            CheckpointError: the file cannot be read, or is damaged.
        """
        with reading(path):
            try:
                return cls.from_json(json.loads(read_regular(path)))
            except (FileNotFoundError, NotADirectoryError):
                return None
