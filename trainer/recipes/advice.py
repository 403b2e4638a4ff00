"""Advice on a recipe for a data set: values that suit a small one, and lines that warn before a training.

Knows nothing about models and hardware; imports no torch.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from trainer.recipes import RECIPES, Recipe

GOOD_STEPS = 500
"""BiT (arXiv 1912.11370) fine-tunes on any set of fewer than 20,000 images for as many."""
GOOD_STEPS_OF = {"photos": 1200, "finetune-efficientnet-lite0": 90}
"""Of recipes that are made for small sets, in place of the steps on the data set that others were chosen on."""
MAX_EPOCHS = 75
"""With batches of MIN_BATCH_SIZE. Of 120 pictures in 5 classes, `photos` learned as much in 75 epochs as in 150."""
FEW_STEPS = 0.6
"""Share of the good number of steps below which a training ends before the network has learned what it can."""
STEPS_PER_EPOCH = 16
"""Chosen for a small set, with a batch of at least MIN_BATCH_SIZE images."""
MIN_BATCH_SIZE = 16
MAX_SUGGESTED_BATCH_SIZE = 256
"""A batch need not have an image of every class; larger ones may not fit in the memory of a GPU."""
MIN_IMAGES_PER_CLASS = 20
MIN_VALIDATION_IMAGES = 50
MAX_LINES = 3
NUM_TRAINING_IMAGES = {"mnist": 55_000, "fashion-mnist": 55_000, "cifar10": 45_000}
"""Training images, without those for validation, of the data sets that recipes were chosen on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSize:
    """The size of a data set as one run divides it."""

    is_folder: bool
    num_channels: int
    num_training_by_class: Mapping[str, int]
    num_validation: int

    @property
    def num_training(self) -> int:
        return sum(self.num_training_by_class.values())


def usual_steps(recipe: Recipe) -> int | None:
    """Returns the steps of a recipe on its own data set; None for recipes that were made for folders."""
    is_for_folders = recipe.is_fine_tuning or recipe.name in GOOD_STEPS_OF
    if is_for_folders or recipe.dataset not in NUM_TRAINING_IMAGES:
        return None
    return _num_steps(recipe, NUM_TRAINING_IMAGES[recipe.dataset])


def has_few_steps(recipe: Recipe, num_images: int) -> bool:
    """Returns whether the set is too small for the recipe: too few steps, even if not for fewer epochs than usual."""
    usual = _usual(recipe)
    longest = replace(recipe, epochs=max(recipe.epochs, usual.epochs))
    return _num_steps(longest, num_images) < FEW_STEPS * _good_steps(usual, num_images)


def choose_batch_and_epochs(recipe: Recipe, num_images: int, *, batch_size: int | None = None) -> tuple[int, int]:
    """Chooses a global batch and epochs that give a small set enough steps.

    Args:
        recipe: unchanged by the command line.
        num_images: training images.
        batch_size: a global batch that is already chosen.

    Returns:
        The global batch and the epochs.
    """
    if batch_size is None:
        batch_size = min(recipe.global_batch_size, max(MIN_BATCH_SIZE, _batch_of_epoch(num_images)))
    num_steps = _good_steps(recipe, num_images)
    return batch_size, max(recipe.epochs, math.ceil(num_steps / math.ceil(num_images / batch_size)))


def describe_batch(recipe: Recipe, usual: int) -> str:
    """Returns the global batch, and how it changes the learning rates if it is not the recipe's own.

    Args:
        recipe: as it is about to be trained.
        usual: the recipe's own global batch.
    """
    text = f"{recipe.global_batch_size} images per step"
    if recipe.global_batch_size == usual:
        return text
    factor = (recipe.global_batch_size / usual) ** 0.5
    return f"{text} (the recipe: {usual}; learning rates are scaled by {factor:.3g})"


def advise(recipe: Recipe, size: DatasetSize, *, is_mirroring_chosen: bool, num_shards: int = 1) -> list[str]:
    """Returns lines about what the recipe assumes and the set may lack, the most important first; `MAX_LINES` at most.

    Args:
        recipe: as it is about to be trained.
        size: the data set's.
        is_mirroring_chosen: the command line has --mirror or --no-mirror.
        num_shards: parts into which the run cuts each batch, which no batch may be smaller than.
    """
    lines: list[str] = []
    if size.is_folder and recipe.augment.flip != "none" and not is_mirroring_chosen:
        lines.append(
            f"{recipe.name} mirrors images at random; if left and right matter (letters, arrows, faces of clocks), "
            "use --no-mirror"
        )
    lines += _advise_on_steps(recipe, size, num_shards)
    lines += _advise_on_images(recipe, size)
    return lines[:MAX_LINES]


def _advise_on_steps(recipe: Recipe, size: DatasetSize, num_shards: int) -> Iterator[str]:
    usual, num_images, num_classes = _usual(recipe), size.num_training, len(size.num_training_by_class)
    if has_few_steps(recipe, num_images):
        num_steps, on_own = _num_steps(recipe, num_images), usual_steps(usual)
        are_few = f"{num_steps:,} steps in all are few" if num_steps > 1 else "1 step in all is little"
        comparison = f" ({on_own:,} on {usual.dataset})" if on_own else ""
        suitable, _ = choose_batch_and_epochs(usual, num_images)
        batch_size = _enlarge_for_classes(min(recipe.global_batch_size, max(suitable, num_shards)), size)
        yield f"{are_few} for {recipe.name}{comparison}: try {_options(recipe, num_images, batch_size)}"
    elif (batch_size := _enlarge_for_classes(recipe.global_batch_size, size)) > recipe.global_batch_size:
        yield (
            f"{num_classes:,} classes are more than the {recipe.global_batch_size} images of a step: "
            f"try {_options(recipe, num_images, batch_size)}, so that the steps are more alike"
        )


def _enlarge_for_classes(batch_size: int, size: DatasetSize) -> int:
    """Returns a batch that may have an image of every class, as far as the set is large enough for it."""
    num_classes = len(size.num_training_by_class)
    most = min(MAX_SUGGESTED_BATCH_SIZE, _batch_of_epoch(size.num_training))
    return batch_size if batch_size >= min(num_classes, most) else min(1 << math.ceil(math.log2(num_classes)), most)


def _options(recipe: Recipe, num_images: int, batch_size: int) -> str:
    """Returns the options that give a run this batch and enough steps, without those that it has."""
    options = [] if batch_size == recipe.global_batch_size else [f"--global-batch-size {batch_size}"]
    _, epochs = choose_batch_and_epochs(_usual(recipe), num_images, batch_size=batch_size)
    changed = replace(recipe, global_batch_size=batch_size)
    if epochs > recipe.epochs and any(has_few_steps(each, num_images) for each in (recipe, changed)):
        options.append(f"--epochs {epochs}")
    return " ".join(options)


def _advise_on_images(recipe: Recipe, size: DatasetSize) -> Iterator[str]:
    rare = {name: count for name, count in size.num_training_by_class.items() if count < MIN_IMAGES_PER_CLASS}
    if rare:
        rarest, have = min(rare, key=lambda name: rare[name]), "has" if len(rare) == 1 else "have"
        is_fine_tuned = recipe.is_fine_tuning
        other = (
            "" if is_fine_tuned or size.num_channels != 3 else ", or try --recipe finetune-resnet18 --image-size 224"
        )
        yield (
            f"{len(rare):,} of {len(size.num_training_by_class):,} classes {have} fewer than {MIN_IMAGES_PER_CLASS} "
            f"training images ({rarest!r} has {rare[rarest]}): expect errors there; add images{other}"
        )
    if 0 < size.num_validation < MIN_VALIDATION_IMAGES:
        points = 98 / size.num_validation**0.5  # half of the widest 95 % interval
        plural = "s" if size.num_validation != 1 else ""
        yield (
            f"{size.num_validation} validation image{plural}: their accuracy may be off by {min(points, 100):.0f} "
            "points; more images, or more of them in a val folder, make it surer"
        )


def _usual(recipe: Recipe) -> Recipe:
    """Returns Convoy's recipe of that name, without changes by a command line; the user's own recipe as it is."""
    return RECIPES.get(recipe.name, recipe)


def _batch_of_epoch(num_images: int) -> int:
    """Returns the power of two with which an epoch has about STEPS_PER_EPOCH steps."""
    return 1 << max(0, round(math.log2(num_images / STEPS_PER_EPOCH)))


def _good_steps(recipe: Recipe, num_images: int) -> int:
    good = GOOD_STEPS_OF.get(recipe.name) or min(GOOD_STEPS, usual_steps(recipe) or GOOD_STEPS)
    return min(good, MAX_EPOCHS * math.ceil(num_images / MIN_BATCH_SIZE))


def _num_steps(recipe: Recipe, num_images: int) -> int:
    return recipe.epochs * math.ceil(num_images / recipe.global_batch_size)
