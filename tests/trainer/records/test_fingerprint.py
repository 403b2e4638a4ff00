"""The record of what decides a run: its digests never change, and it becomes a recipe again."""

import pytest

from trainer.recipes import RECIPES, Recipe
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
    assert fingerprint_of(recipe).recipe == recipe


def test_a_fingerprint_with_fewer_fields_keeps_its_digest() -> None:
    """A run from before virtual shards: the missing field is not added, and does not differ from None."""
    new = Fingerprint.of(RECIPES["mnist"], seed=0, image_size=None, dataset_sha256="d", virtual_shards=None)
    old = Fingerprint({name: value for name, value in new.values.items() if name != "virtual_shards"})
    assert old.recipe == RECIPES["mnist"]
    assert old.sha256 != new.sha256
    assert old.differences(new) == []


def test_differences_have_dotted_names() -> None:
    mnist, other = fingerprint_of(RECIPES["mnist"]), fingerprint_of(RECIPES["mnist-lenet5"])
    assert ("recipe.rules.vectors.lr", 0.1, 0.05) in mnist.differences(other)
    assert mnist.differences(mnist.with_dataset("cifar10")) == [("recipe.dataset", "mnist", "cifar10")]
