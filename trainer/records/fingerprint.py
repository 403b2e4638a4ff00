"""All that decides a run's result, as one record.

`config.json` and each exported manifest hold its values; the ledger and the comparison of runs know it by its digests.
"""

import hashlib
import json
import types
import typing
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Self

from trainer.network_files import without_paths
from trainer.recipes import ParamGroup, Recipe, TestTimeViews

_ALWAYS_WRITTEN = {
    "Recipe": {
        "name",
        "summary",
        "dataset",
        "network",
        "widths",
        "global_batch_size",
        "epochs",
        "param_groups",
        "schedule",
        "augment",
        "label_smoothing",
        "precision",
        "test_time_views",
        "num_validation",
    },
    "ParamGroup": {"lr", "momentum", "weight_decay"},
    "Schedule": {"points"},
    "Augment": {"flip", "shift", "fill", "rotate_degrees", "scale"},
}
"""The fields of version 0.1. All others are left out where they have their default, so that a new field, whose default
changes nothing, keeps the digests of runs from before it. Add none here."""

_NAMES_ON_DISK = {"param_groups": "rules"}
"""Fields of a recipe that files know by an older name. The digests are over these names: with others, `config_sha256`
and `setting_sha256` in ledgers would no longer match."""
_NAMES_IN_CODE = {on_disk: name for name, on_disk in _NAMES_ON_DISK.items()}

_MUON = "orthogonalize"
"""The flag of a parameter group on disk that its optimizer is Muon."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All that decides a run's result: two runs with the same fingerprint compute the same.

    Args:
        values: the fingerprint as JSON, as `config.json` holds it. The digests are over these values, not over the
            recipe read from them, so that a run of an older version, with fewer fields, keeps its digests.
    """

    values: dict[str, Any]

    @classmethod
    def of(  # noqa: PLR0913 (all that decides a result)
        cls,
        recipe: Recipe,
        *,
        seed: int,
        image_size: int | None,
        dataset_sha256: str,
        virtual_shards: int | None,
        is_streamed: bool = False,
        is_compiled: bool = False,
        has_bfloat16_gradients: bool = False,
    ) -> Self:
        """Returns the fingerprint of a run that is about to begin."""
        values = {
            "recipe": _to_disk(without_paths(recipe)),
            "seed": seed,
            "image_size": image_size,
            "dataset_sha256": dataset_sha256,
            "virtual_shards": virtual_shards,
            **({"source": "streamed"} if is_streamed else {}),
            **({"compiled": True} if is_compiled else {}),
            **({"gradients": "bfloat16"} if has_bfloat16_gradients else {}),
        }
        return cls(json.loads(json.dumps(values)))  # tuples become lists, as in a file

    @property
    def recipe(self) -> Recipe:
        """The recipe as the run computes it, even if the recipe of that name has changed since."""
        recipe: Recipe = _from_disk(Recipe, self.values["recipe"])
        return recipe

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
    def source(self) -> Literal["resident", "streamed"]:
        """Whether the run has its images in memory, or decodes them when it needs them."""
        return "streamed" if self.values.get("source") == "streamed" else "resident"

    @property
    def is_compiled(self) -> bool:
        """Whether the training steps are compiled, which changes the rounding."""
        return bool(self.values.get("compiled", False))

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

    @property
    def settings(self) -> dict[str, Any]:
        """The values by the names that `--set` and `convoy recipes` have for them."""
        settings: dict[str, Any] = _name_as_options(self.values)
        return settings

    def with_dataset(self, name: str) -> "Fingerprint":
        """Returns the same fingerprint with the data set under another name."""
        return Fingerprint({**self.values, "recipe": {**self.values["recipe"], "dataset": name}})

    def differences(self, other: "Fingerprint") -> list[tuple[str, Any, Any]]:
        """Returns where two fingerprints differ, as (dotted name, this one's value, the other's value)."""
        return _differences("", self.settings, other.settings)


def _to_disk(value: Any) -> Any:
    """Returns a dataclass of numbers, texts, tuples, dicts and other dataclasses as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        written = (field for field in fields(value) if _is_written(field, value))
        named = {_NAMES_ON_DISK.get(field.name, field.name): _to_disk(getattr(value, field.name)) for field in written}
        return _group_to_disk(named) if isinstance(value, ParamGroup) else named
    if isinstance(value, dict):
        return {key: _to_disk(item) for key, item in value.items()}
    return [_to_disk(item) for item in value] if isinstance(value, list | tuple) else value


def _is_written(field: "Field[Any]", value: Any) -> bool:
    if field.name in _ALWAYS_WRITTEN.get(type(value).__name__, ()):
        return True
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default is MISSING or bool(getattr(value, field.name) != default)


def _from_disk(kind: Any, value: Any) -> Any:
    """Returns a value of the type `kind` from its JSON. Numbers stay as they are: an int may stand for a float."""
    arguments = typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        named = {_NAMES_IN_CODE.get(name, name): item for name, item in value.items()}
        named = _group_from_disk(named) if kind is ParamGroup else named
        if unknown := sorted(named.keys() - hints.keys()):
            raise ValueError(f"{kind.__name__} has no {', '.join(unknown)} in this version; a later one may")
        return kind(**{name: _from_disk(hints[name], item) for name, item in named.items()})
    match typing.get_origin(kind):
        case origin if origin is dict:
            return {key: _from_disk(arguments[1], item) for key, item in value.items()}
        case origin if origin is list:
            return [_from_disk(arguments[0], item) for item in value]
        case origin if origin is tuple:
            kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
            return tuple(_from_disk(*pair) for pair in zip(kinds, value, strict=True))
        case typing.Union | types.UnionType if value is not None:
            return _from_disk(next(kind for kind in arguments if _fits(kind, value)), value)
        case typing.Annotated:
            return _from_disk(arguments[0], value)
    return value


def _name_as_options(value: Any) -> Any:
    """Returns JSON from disk with the names of options; a file may be damaged, so that anything stands anywhere."""
    if not isinstance(value, dict):
        return value
    inner: dict[str, Any] = value
    named = {_NAMES_IN_CODE.get(name, name): _name_as_options(item) for name, item in inner.items()}
    return _group_from_disk(named) if _MUON in named else named


def _group_to_disk(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a parameter group as version 0.1 wrote it, with a flag for Muon; another optimizer has its name."""
    is_muon = values.get("optimizer") == "muon"
    return {**{name: item for name, item in values.items() if not (is_muon and name == "optimizer")}, _MUON: is_muon}


def _group_from_disk(values: dict[str, Any]) -> dict[str, Any]:
    others = {name: item for name, item in values.items() if name != _MUON}
    return {**others, "optimizer": "muon"} if values.get(_MUON) else others


def _fits(kind: Any, value: Any) -> bool:
    """Returns whether one of a union's types may hold what JSON has; a union's containers are of different kinds."""
    if isinstance(value, dict):
        return is_dataclass(kind) or typing.get_origin(kind) is dict
    if isinstance(value, list):
        return typing.get_origin(kind) in (list, tuple)
    return kind is not types.NoneType


def recipe_sha256(recipe: Recipe) -> str:
    """Returns the digest of a recipe, wherever its files are."""
    return _digest(_to_disk(without_paths(recipe)))


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
