"""One line of the ledger."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from trainer.typed_values import convert_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedWeights:
    """The weights that are evaluated, and the run that they are from.

    Args:
        run: name of the run's folder.
        config_sha256: digest of everything that decides the run's result.
        setting_sha256: of the same without the seed.
    """

    recipe: str
    run: str
    seed: int
    weights_sha256: str
    config_sha256: str
    setting_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """An evaluation on a test set. Old entries lack the fields with a default; see `EvaluatedWeights` for some of them.

    Args:
        time: ISO 8601, UTC.
        dataset: name of the data set.
        test_sha256: digest of the test images.
        accuracy: between 0 and 1; of one view of each image. Entries of version 0.1 average the recipe's views.
        accuracy_with_views: the mean over the recipe's test-time views, where it has several.
    """

    time: str | None = None
    dataset: str | None = None
    dataset_sha256: str
    test_sha256: str | None = None
    recipe: str | None = None
    run: str | None = None
    seed: int | None = None
    weights_sha256: str
    config_sha256: str | None = None
    setting_sha256: str | None = None
    accuracy: float
    num_errors: int
    num_images: int
    accuracy_with_views: float | None = None
    num_errors_with_views: int | None = None

    @property
    def result(self) -> tuple[str, int, int, int | None]:
        """Identifies the evaluation: entries of one test set with equal results are duplicates."""
        return self.weights_sha256, self.num_errors, self.num_images, self.num_errors_with_views

    def to_line(self) -> str:
        """Returns the entry as a line of JSON, with a digest of its fields at the end."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        # ASCII, so that names of folders that are not UTF-8 survive too.
        return json.dumps({**values, "sha256": _digest(values)})

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Returns the entry of a line. Ignores the link to the line before that lines of version 0.1 have.

        Raises:
            ValueError: the line is no entry or was changed; the message continues a sentence about the line.
        """
        try:
            values = json.loads(line)
        except ValueError:
            raise ValueError("is not JSON: repair it by hand, or restore the ledger from a copy") from None
        required = {each.name for each in fields(cls) if each.default is MISSING}
        if not isinstance(values, dict) or not values.keys() >= required:
            raise ValueError("is not an entry of a ledger: remove it, or restore the ledger from a copy")
        values.pop("previous", None)
        digest = values.pop("sha256", None)
        if digest not in (None, _digest(values)):
            raise ValueError("was changed after it was written: restore the ledger from a copy")
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        if digest is None:  # an old line, or one that was written by hand
            try:
                known = convert_fields(cls, known)
            except ValueError as error:
                raise ValueError(f"is not an entry of a ledger: {error}") from None
        return cls(**known)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
