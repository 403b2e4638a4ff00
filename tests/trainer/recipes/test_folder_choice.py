"""The choice of a recipe for a folder, from facts alone."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.recipes import RECIPES
from trainer.recipes.folder_choice import TABLE, FolderFacts, choose, describe

PHOTOS = {"num_training": 700, "short_side": 375, "has_gpu": False}


@pytest.mark.parametrize(
    ("recipe", "image_size"), [("cifar10-small", 32), ("photos", 160), ("finetune-resnet18", 224), (None, 224)]
)
def test_a_recipe_that_is_given_has_images_of_its_size(recipe: str | None, image_size: int) -> None:
    facts = FolderFacts(num_training=700, short_side=375, has_gpu=False, has_package=True)
    assert choose(facts, recipe).image_size == image_size


@pytest.mark.parametrize(
    ("facts", "recipe", "image_size"),
    [
        (PHOTOS, "photos", 160),
        ({**PHOTOS, "short_side": None}, "photos", 160),
        ({**PHOTOS, "has_package": True}, "finetune-efficientnet-lite0", 224),
        ({**PHOTOS, "has_package": True, "short_side": 64}, "photos", 160),
        ({**PHOTOS, "short_side": 32}, "cifar10-small", 32),
        ({**PHOTOS, "has_weights": True}, "finetune-efficientnet-lite0", 224),
        ({**PHOTOS, "has_weights": True, "has_network": True}, "finetune-network", 224),
        ({**PHOTOS, "has_network": True}, "any-network", 64),
        ({**PHOTOS, "has_network": True, "has_gpu": True}, "any-network", 224),
        ({**PHOTOS, "has_network": True, "short_side": 28}, "any-network", 32),
    ],
)
def test_facts_choose(facts: dict[str, int], recipe: str, image_size: int) -> None:
    row = choose(FolderFacts(**facts))  # type: ignore[arg-type]
    assert (row.recipe, row.image_size) == (recipe, image_size)


def test_the_package_is_recommended_where_it_would_change_the_choice() -> None:
    facts = FolderFacts(num_training=700, short_side=375, has_gpu=False)
    assert "pip install" in choose(facts).why
    unfit: tuple[dict[str, Any], ...] = (
        {"short_side": 64},
        {"short_side": None},
        {"has_package": True, "short_side": 64},
    )
    for no_use in unfit:
        assert "pip install" not in choose(replace(facts, **no_use)).why


def test_every_row_names_a_recipe_and_the_last_fits_everything() -> None:
    assert {row.recipe for row in TABLE} <= RECIPES.keys()
    for has_gpu in (True, False):
        assert TABLE[-1].fits(FolderFacts(num_training=1, short_side=None, has_gpu=has_gpu))


def test_facts_are_told_in_a_few_words() -> None:
    facts = FolderFacts(num_training=1200, short_side=375, has_gpu=True)
    assert describe(facts) == "1,200 training images of about 375 pixels, a GPU"
    assert describe(replace(facts, is_estimated=True)).startswith("about 1,200 training images of")
