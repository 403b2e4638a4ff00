"""Advice on a recipe for a data set: lines before a training, and a batch and epochs for small sets."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from trainer.data.datasets import DATASETS
from trainer.recipes import RECIPES, Recipe
from trainer.recipes.advice import (
    GOOD_STEPS_OF,
    MAX_EPOCHS,
    MIN_BATCH_SIZE,
    NUM_TRAINING_IMAGES,
    DatasetSize,
    advise,
    choose_batch_and_epochs,
    describe_batch,
    has_few_steps,
    usual_steps,
)

SMALL = RECIPES["cifar10-small"]
MIRRORING = [
    name for name in RECIPES if name.startswith(("cifar10", "finetune-", "fashion-mnist", "photos", "any-network"))
]


def size(by_class: dict[str, int] | int, **others: Any) -> DatasetSize:
    counts = by_class if isinstance(by_class, dict) else {"cat": by_class // 2, "dog": by_class - by_class // 2}
    known = {"is_folder": True, "num_channels": 3, "num_validation": 500, **others}
    return DatasetSize(num_training_by_class=counts, **known)


def advice(recipe: str | Recipe, known: DatasetSize, *, is_mirroring_chosen: bool = True) -> list[str]:
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return advise(recipe, known, is_mirroring_chosen=is_mirroring_chosen)


def test_recipes_suit_the_sets_that_they_were_chosen_on() -> None:
    for name, number in NUM_TRAINING_IMAGES.items():
        assert DATASETS[name].num_train - SMALL.num_validation == number
    assert [usual_steps(RECIPES[name]) for name in ("mnist", "cifar10-small", "cifar10")] == [5500, 720, 276]
    for recipe in RECIPES.values():
        own = size(NUM_TRAINING_IMAGES[recipe.dataset], is_folder=False)
        assert advice(recipe, own, is_mirroring_chosen=False) == []
        assert advice(replace(recipe, epochs=1), own, is_mirroring_chosen=False) == []  # the user wants a short one


def test_a_recipe_that_mirrors_images_of_a_folder_gives_a_line() -> None:
    for name in RECIPES:
        lines = advice(name, size(100_000), is_mirroring_chosen=False)
        line = f"{name} mirrors images at random; if left and right matter (letters, arrows, faces of clocks), "
        assert lines == [line + "use --no-mirror"] * (name in MIRRORING)
        assert advice(name, size(100_000)) == []


def test_too_few_steps_give_a_line_with_a_batch_and_epochs_that_suit_the_set() -> None:
    assert advice(SMALL, size(560)) == [
        "16 steps in all are few for cifar10-small (720 on cifar10): try --global-batch-size 32 --epochs 28"
    ]
    assert advice(SMALL.with_global_batch_size(32), size(560)) == [
        "144 steps in all are few for cifar10-small (720 on cifar10): try --epochs 28"
    ]
    assert advice(replace(SMALL, epochs=28), size(560)) == [
        "56 steps in all are few for cifar10-small (720 on cifar10): try --global-batch-size 32"
    ]
    assert advice("finetune-resnet18", size(560)) == [
        "45 steps in all are few for finetune-resnet18: try --global-batch-size 32 --epochs 28"
    ]
    assert advice("cifar10", size(10_000)) == [
        "60 steps in all are few for cifar10 (276 on cifar10): try --global-batch-size 512 --epochs 14"
    ]
    assert advice(replace(SMALL, epochs=1), size(90))[0].startswith("1 step in all is little for cifar10-small (720")
    assert advice(replace(SMALL, epochs=150), size(560)) == []


@pytest.mark.parametrize("num_images", [2, 9, 60, 560, 3000, 8000, 40_000, 1_000_000])
def test_the_suggested_batch_and_epochs_give_enough_steps(num_images: int) -> None:
    for recipe in RECIPES.values():
        batch_size, epochs = choose_batch_and_epochs(recipe, num_images)
        assert MIN_BATCH_SIZE <= batch_size <= recipe.global_batch_size
        assert recipe.epochs <= epochs
        assert epochs <= max(recipe.epochs, MAX_EPOCHS if batch_size == MIN_BATCH_SIZE else 170)
        fitted = replace(recipe.with_global_batch_size(batch_size), epochs=epochs)
        for real in (num_images, num_images * 8 // 10):  # the number is an estimate, before images are held out
            assert not has_few_steps(fitted, real)
        assert choose_batch_and_epochs(recipe, num_images, batch_size=100)[0] == 100


def options_in(lines: list[str]) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"--(global-batch-size|epochs) (\d+)", " ".join(lines))}


@pytest.mark.parametrize(
    "name", ["mnist", "cifar10", "cifar10-small", "any-network", "finetune-resnet18", *GOOD_STEPS_OF]
)
def test_suggested_options_change_the_run_and_silence_the_line(name: str) -> None:
    recipe = RECIPES[name]
    cases = itertools.product((2, 60, 560, 3000, 20_000), (2, 60, 300), (4, 16, 100, 500), (1, 5, 40), (1, 48))
    for num_images, num_classes, batch_size, epochs, num_shards in cases:
        if num_classes > num_images or num_shards > batch_size:
            continue
        known = size({str(number): len(range(number, num_images, num_classes)) for number in range(num_classes)})
        has = {"global-batch-size": batch_size, "epochs": epochs}
        run = replace(recipe.with_global_batch_size(batch_size), epochs=epochs)
        asked = options_in(advise(run, known, is_mirroring_chosen=True, num_shards=num_shards))
        assert not asked.items() & has.items()
        assert asked.get("global-batch-size", num_shards) >= num_shards
        has |= asked
        followed = replace(recipe.with_global_batch_size(has["global-batch-size"]), epochs=has["epochs"])
        left = advise(followed, known, is_mirroring_chosen=True, num_shards=num_shards)
        assert not any("step" in line for line in left), (asked, left)


def test_rare_classes_and_few_validation_images_give_a_line() -> None:
    classes = {"cat": 900, "dog": 900, "okapi": 7, "saola": 12}
    assert advice(replace(SMALL, epochs=100), size(classes, num_validation=12)) == [
        "2 of 4 classes have fewer than 20 training images ('okapi' has 7): expect errors there; add images, or try "
        "--recipe finetune-resnet18 --image-size 224",
        "12 validation images: their accuracy may be off by 28 points; more images, or more of them in a val folder, "
        "make it surer",
    ]
    grey, long = size(classes, num_channels=1), {"epochs": 100}
    for lines in (
        advice(replace(SMALL, **long), grey),
        advice(replace(RECIPES["finetune-vgg16"], **long), size(classes)),
    ):
        assert [line.rpartition("; ")[2] for line in lines] == ["add images"]
    assert advice("mnist", size(100_000, num_validation=1))[0].startswith("1 validation image: their accuracy")


def test_more_classes_than_images_in_a_step_give_a_line() -> None:
    many = size({str(number): 50 for number in range(200)})
    assert advice("finetune-resnet18", many) == [
        "200 classes are more than the 64 images of a step: try --global-batch-size 256 --epochs 13, so that the steps "
        "are more alike"
    ]
    assert advice(SMALL.with_global_batch_size(256), replace(many)) == []
    assert advice("cifar10-resnet18", size({str(number): 1000 for number in range(128)})) == []


def test_there_are_three_lines_at_most() -> None:
    lines = advice(SMALL, size(10, num_validation=1), is_mirroring_chosen=False)
    assert [line.split()[1] for line in lines] == ["mirrors", "steps", "of"]


def test_another_batch_is_described_with_its_learning_rates() -> None:
    assert describe_batch(SMALL, 500) == "500 images per step"
    assert describe_batch(SMALL.with_global_batch_size(32), 500) == (
        "32 images per step (the recipe: 500; learning rates are scaled by 0.253)"
    )
    assert describe_batch(RECIPES["mnist"].with_global_batch_size(50), 100) == (
        "50 images per step (the recipe: 100; learning rates are scaled by 0.707)"
    )


def test_another_batch_scales_the_rate_of_every_group() -> None:
    for recipe in RECIPES.values():
        rates = {kind: group.lr for kind, group in recipe.param_groups.items()}
        scaled = recipe.with_global_batch_size(4 * recipe.global_batch_size).param_groups
        assert {kind: group.lr for kind, group in scaled.items()} == {kind: 2 * lr for kind, lr in rates.items()}


def test_a_recipe_of_the_user_gets_advice_too() -> None:
    own = replace(SMALL, name="mine", dataset="folder:/photos")
    (line,) = [line for line in advise(own, size(1000), is_mirroring_chosen=True) if "steps" in line]
    assert line == "16 steps in all are few for mine: try --global-batch-size 64 --epochs 32"
