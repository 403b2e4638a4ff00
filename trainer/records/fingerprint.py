"""All that decides a run's result, as one record.

`config.json` and each exported manifest hold its values; the ledger and the comparison of runs know it by its digests.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from trainer.recipes import Augment, ParamGroup, Recipe, Schedule, TestTimeViews

_NAMES_ON_DISK = {"param_groups": "rules", "muon": "orthogonalize"}
"""Fields of a recipe and of its parameter groups that files know by an older name. The digests are over these names:
with others, `config_sha256` and `setting_sha256` in ledgers would no longer match."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All that decides a run's result: two runs with the same fingerprint compute the same.

    Args:
        values: the fingerprint as JSON, as `config.json` holds it. The digests are over these values, not over the
            recipe read from them, so that a run of an older version, with fewer fields, keeps its digests.
    """

    values: dict[str, Any]

    @classmethod
    def of(
        cls, recipe: Recipe, *, seed: int, image_size: int | None, dataset_sha256: str, virtual_shards: int | None
    ) -> Self:
        """Returns the fingerprint of a run that is about to begin."""
        values = {
            "recipe": asdict(recipe, dict_factory=_to_disk),
            "seed": seed,
            "image_size": image_size,
            "dataset_sha256": dataset_sha256,
            "virtual_shards": virtual_shards,
        }
        return cls(json.loads(json.dumps(values)))  # tuples become lists, as in a file

    @property
    def recipe(self) -> Recipe:
        """The recipe as the run computes it, even if the recipe of that name has changed since."""
        return _read_recipe(self.values["recipe"])

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

    @property
    def image_size(self) -> int | None:
        size: int | None = self.values["image_size"]
        return size

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return str(self.values["recipe"]["dataset"])

    @property
    def dataset_sha256(self) -> str:
        return str(self.values["dataset_sha256"])

    @property
    def test_time_views(self) -> TestTimeViews:
        """Views of an image whose logits are averaged; `one` for a recipe from before there were several."""
        views: TestTimeViews = self.values["recipe"].get("test_time_views", "one")
        return views

    @property
    def sha256(self) -> str:
        """The digest of everything, `config_sha256` in the ledger."""
        return _digest(self.values)

    @property
    def setting_sha256(self) -> str:
        """The digest of everything but the seed."""
        return _digest({name: value for name, value in self.values.items() if name != "seed"})

    def with_dataset(self, name: str) -> "Fingerprint":
        """Returns the same fingerprint with the data set under another name."""
        return Fingerprint({**self.values, "recipe": {**self.values["recipe"], "dataset": name}})

    def differences(self, other: "Fingerprint") -> list[tuple[str, Any, Any]]:
        """Returns where two fingerprints differ, as (dotted name, this one's value, the other's value)."""
        return _differences("", self.values, other.values)


def _to_disk(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {_NAMES_ON_DISK.get(name, name): value for name, value in fields}


def _from_disk(values: dict[str, Any]) -> dict[str, Any]:
    known = {on_disk: name for name, on_disk in _NAMES_ON_DISK.items()}
    return {known.get(name, name): value for name, value in values.items()}


def _read_recipe(values: dict[str, Any]) -> Recipe:
    fields = _from_disk(values)
    fields["widths"] = tuple(fields["widths"])
    fields["param_groups"] = {kind: ParamGroup(**_from_disk(group)) for kind, group in fields["param_groups"].items()}
    fields["schedule"] = Schedule(points=tuple((at, factor) for at, factor in fields["schedule"]["points"]))
    fields["augment"] = Augment(**fields["augment"])
    return Recipe(**fields)


def _digest(values: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _differences(name: str, mine: Any, other: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(mine, dict) and isinstance(other, dict):
        found = []
        for key in sorted(mine.keys() | other.keys()):
            found += _differences(f"{name}.{key}".lstrip("."), mine.get(key), other.get(key))
        return found
    return [] if mine == other else [(name, mine, other)]
