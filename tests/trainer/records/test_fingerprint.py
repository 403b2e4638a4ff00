"""The record of what decides a run: its digests never change, and it becomes a recipe again."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from trainer.network_files import without_paths
from trainer.recipes import RECIPES, Augment, Recipe
from trainer.records import fingerprint as fingerprint_module
from trainer.records.fingerprint import Fingerprint


def fingerprint_of(recipe: Recipe) -> Fingerprint:
    return Fingerprint.of(recipe, seed=3, image_size=None, dataset_sha256="d" * 64, virtual_shards=4)


def test_digests_stay_as_ledgers_have_them() -> None:
    """Computed by version 0.1.0, whose files have `rules` and `orthogonalize`: new names in code change no digest."""
    mnist, cifar10 = fingerprint_of(RECIPES["mnist"]), fingerprint_of(RECIPES["cifar10-small"])
    assert mnist.sha256 == "f0d31e43509b5820f59a7f7864b25f80bcceaf60b743822488ee4cf0bf6ac0c7"
    assert mnist.setting_sha256 == "4538417d97681a17e5f4dc61628624bfcd3b78d6e151c632c1c43d05616c4be7"
    assert cifar10.sha256 == "a7c5c861a77a00e4f15450c59c957d3bc048528d106f6ea202f2bed69dea6500"
    assert cifar10.setting_sha256 == "36da78662d9971ce378bb10a359d825711d3403e0ca826874299953e069a1140"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_is_read_back(recipe: Recipe) -> None:
    assert fingerprint_of(recipe).recipe == without_paths(recipe)


def test_a_fingerprint_with_fewer_fields_keeps_its_digest() -> None:
    """A run from before virtual shards: the missing field is not added, and does not differ from None."""
    new = Fingerprint.of(RECIPES["mnist"], seed=0, image_size=None, dataset_sha256="d", virtual_shards=None)
    old = Fingerprint({name: value for name, value in new.values.items() if name != "virtual_shards"})
    assert old.recipe == RECIPES["mnist"]
    assert old.sha256 != new.sha256
    assert old.differences(new) == []


@pytest.mark.parametrize("rules", [[1], {"stem": 3}, None])
def test_damaged_groups_differ(rules: object) -> None:
    mnist = fingerprint_of(RECIPES["mnist"])
    damaged = Fingerprint({**mnist.values, "recipe": {**mnist.values["recipe"], "rules": rules}})
    assert all(name.startswith("recipe.param_groups") for name, _, _ in mnist.differences(damaged))
    assert mnist.differences(damaged)


def test_differences_have_dotted_names() -> None:
    mnist, other = fingerprint_of(RECIPES["mnist"]), fingerprint_of(RECIPES["mnist-lenet5"])
    assert ("recipe.param_groups.vectors.lr", 0.1, 0.05) in mnist.differences(other)
    assert mnist.differences(mnist.with_dataset("cifar10")) == [("recipe.dataset", "mnist", "cifar10")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Average:
    decay: float = 0.999
    warmup: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Later:
    """Fields as a later version may add them."""

    required: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weights: str | None = None
    clip: float | None = 1.0
    is_nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    stages: tuple[int, ...] = ()
    average: _Average | None = None
    rates: dict[str, float] = field(default_factory=dict)
    averages: dict[str, _Average] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "on_disk"),
    [
        (_Later(required=1), {"required": 1}),
        (_Later(required=1, average=_Average()), {"required": 1, "average": {}}),
        (_Later(required=0, clip=None, is_nesterov=True), {"required": 0, "clip": None, "is_nesterov": True}),
        (
            _Later(required=1, weights="a.pth", stages=(1, 2), betas=(0.8, 0.9), average=_Average(decay=0.9)),
            {"required": 1, "weights": "a.pth", "stages": [1, 2], "betas": [0.8, 0.9], "average": {"decay": 0.9}},
        ),
        (
            _Later(required=1, rates={"head": 0.5}, averages={"head": _Average(warmup=True)}),
            {"required": 1, "rates": {"head": 0.5}, "averages": {"head": {"warmup": True}}},
        ),
    ],
)
def test_new_fields_are_written_only_where_they_are_not_at_their_default(value: _Later, on_disk: Any) -> None:
    assert fingerprint_module._to_disk(value) == on_disk
    assert fingerprint_module._from_disk(_Later, on_disk) == value


def test_a_field_of_version_0_1_is_written_even_at_its_default() -> None:
    recipe = replace(RECIPES["mnist"], augment=Augment(), label_smoothing=0.0)
    written = fingerprint_of(recipe).values["recipe"]
    assert written["label_smoothing"] == 0.0
    assert set(written["augment"]) == {"flip", "shift", "fill", "rotate_degrees", "scale"}


def test_a_field_of_a_later_version_is_named() -> None:
    values = fingerprint_of(RECIPES["mnist"]).values
    with pytest.raises(ValueError, match="Augment has no blur, fog in this version"):
        _ = Fingerprint({"recipe": {**values["recipe"], "augment": {"fog": 1, "blur": 2}}}).recipe
