"""Recipes are complete, frozen and found by name."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.loop.runs import make_run
from trainer.data import Dataset, ImageSet
from trainer.data.augment import augment_batch, draw_params
from trainer.data.datasets import DATASETS
from trainer.errors import ConfigError
from trainer.evaluation.views import average_views
from trainer.loop.fit import fit
from trainer.models import build_network
from trainer.recipes import PRETRAINED, PRETRAINED_PREFIX, RECIPES, Recipe, Schedule, find_recipe
from trainer.recipes.augmentation import Augment
from trainer.signals import StopRequest


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_recipe_names_a_known_data_set_and_network(recipe: Recipe) -> None:
    assert recipe.dataset in DATASETS
    if recipe.network.startswith(PRETRAINED_PREFIX):
        assert recipe.network.removeprefix(PRETRAINED_PREFIX) in PRETRAINED  # building it would fetch its weights
    elif recipe.network.startswith("airbench"):
        build_network(recipe.network, num_channels=3, image_size=64, num_classes=10, widths=recipe.widths)
    else:
        with torch.device("meta"):
            build_network(recipe.network, num_channels=3, image_size=32, num_classes=10, widths=recipe.widths)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 1  # type: ignore[misc]


def test_bfloat16_is_used_only_where_the_hardware_is_fast_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, recipe = torch.device("cpu"), RECIPES["mnist"]
    monkeypatch.setattr("trainer.hardware._cpuinfo", lambda field: "fpu avx512f amx_bf16")
    assert recipe.as_computed_on(cpu) is recipe
    monkeypatch.setattr("trainer.hardware._cpuinfo", lambda field: "fpu avx512f")
    assert recipe.as_computed_on(cpu) == replace(recipe, precision="float32")


def test_tf32_is_a_precision_of_its_own_and_float32_never_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    recipe = replace(RECIPES["mnist"], precision="tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert recipe.as_computed_on(gpu) is recipe
    assert recipe.as_computed_on(cpu).precision == "float32"  # a run of a GPU is evaluated and exported on CPUs, too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert recipe.as_computed_on(gpu).precision == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert RECIPES["mnist"].as_computed_on(gpu).precision == "float32"


def moves_only(augment: Augment) -> Augment:
    """Returns the augmentation without changes of colours and without erasing."""
    return replace(augment, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, erase=0.0)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_all_that_a_recipe_does_to_places_can_be_turned_off(recipe: Recipe) -> None:
    """Training images and test-time views keep every pixel in its place, so that places and sides can be learned."""
    images = torch.randint(256, (4, 1, 12, 12), dtype=torch.uint8)
    changed = recipe.with_augmentation(mirror=False, shift=0, rotate_degrees=0.0, scale=0.0)
    augment = moves_only(changed.augment)
    params = draw_params(augment, len(images), seed=0, epoch=1)
    assert torch.equal(augment_batch(augment, images, torch.arange(4), params), images)
    assert (changed.test_time_views, changed.param_groups) == ("one", recipe.param_groups)
    assert recipe.with_augmentation() == recipe


def draw_letters(number: int, seed: int) -> ImageSet:
    """Returns noisy images of b and d, each the mirror image of the other."""
    images = torch.randint(60, (number, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(number) % 2
    images[:, :, 6:26, 15:17] = 250
    images[labels == 0, :, 16:26, 17:26] = 250
    images[labels == 1, :, 16:26, 6:15] = 250
    return ImageSet(images, labels)


@pytest.mark.parametrize(("mirror", "is_learned"), [(None, False), (False, True)])
def test_letters_that_are_mirror_images_are_learned_without_mirroring_alone(
    mini: Dataset, tmp_path: Path, mirror: bool | None, is_learned: bool
) -> None:
    letters = replace(mini, classes=("b", "d"), train=draw_letters(100, seed=0), mean=(60.0,), std=(70.0,))
    recipe = RECIPES["cifar10-lenet5"].with_augmentation(mirror=mirror).with_global_batch_size(16)
    run = make_run(replace(recipe, epochs=12, precision="float32"), letters, tmp_path / "run")
    with StopRequest() as stop:
        fit(run, stop)
    accuracy = run.learner.evaluate(draw_letters(60, seed=1), None, run.world).accuracy
    assert accuracy == 1 if is_learned else accuracy < 0.8


ROWS_AND_COLUMNS = {
    "an arrow": [(slice(5, 6), slice(2, 10)), (slice(3, 8), slice(8, 9))],
    "the face of a clock": [(slice(2, 6), slice(6, 7)), (slice(6, 7), slice(6, 10))],
    "a spot on one side": [(slice(4, 8), slice(1, 4))],
}


@pytest.mark.parametrize("recipe", [r for r in RECIPES.values() if r.augment.flip != "none"], ids=lambda r: r.name)
@pytest.mark.parametrize("parts", ROWS_AND_COLUMNS.values(), ids=list(ROWS_AND_COLUMNS))
def test_mirroring_gives_two_mirrored_classes_the_same_images(recipe: Recipe, parts: list[tuple[slice, slice]]) -> None:
    """No network can tell them apart then; without mirroring no image of one class is one of the other."""
    one = torch.randint(60, (4, 1, 12, 12), dtype=torch.uint8)
    for rows, columns in parts:
        one[:, :, rows, columns] = 255
    for mirror in (None, False):
        augment = moves_only(recipe.with_augmentation(mirror=mirror, shift=0).augment)
        seen: list[set[bytes]] = [set(), set()]
        for images, found in zip((one, one.flip(-1)), seen, strict=True):
            for epoch in range(2):
                batch = augment_batch(augment, images, torch.arange(4), draw_params(augment, 4, seed=0, epoch=epoch))
                found.update(image.numpy().tobytes() for image in batch)
        assert (seen[0] == seen[1], seen[0].isdisjoint(seen[1])) == (mirror is None, mirror is False)


def test_test_time_views_follow_the_augmentation() -> None:
    small, digits = RECIPES["cifar10-small"], RECIPES["mnist-fast"]
    pixels = torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8)

    def views(recipe: Recipe, **chosen: bool | int) -> list[torch.Tensor]:
        """Returns what the network is shown of an image."""
        seen: list[torch.Tensor] = []
        recipe = recipe.with_augmentation(**chosen)  # type: ignore[arg-type]
        average_views(lambda shown: (seen.append(shown.float()), shown)[1], pixels, recipe.test_time_views)
        return seen

    def is_shown(picture: torch.Tensor, seen: list[torch.Tensor]) -> bool:
        return any(torch.equal(view, picture.float()) for view in seen)

    assert is_shown(pixels.flip(-1), views(small))
    assert not is_shown(pixels.flip(-1), views(small, mirror=False))
    assert len(views(small, mirror=False)) == 5
    assert [len(views(small, **chosen)) for chosen in ({"shift": 0}, {"shift": 1}, {"shift": 0, "mirror": False})] == [
        2,
        6,
        1,
    ]
    assert [len(views(digits)), len(views(digits, shift=0)), len(views(digits, mirror=False))] == [5, 1, 5]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_learning_rates_follow_the_batch(recipe: Recipe) -> None:
    assert recipe.with_global_batch_size(recipe.global_batch_size) == recipe
    quarter = recipe.with_global_batch_size(recipe.global_batch_size // 4)
    for kind, group in quarter.param_groups.items():
        assert dataclasses.replace(group, lr=0.0) == replace(recipe.param_groups[kind], lr=0.0)
        assert group.lr == pytest.approx(recipe.param_groups[kind].lr / 2, rel=0.01)


def test_rates_that_are_for_the_sum_over_a_batch_follow_the_square_root_too() -> None:
    """airbench's rate of the head is 0.67 times the batch; in proportion, larger batches diverge."""
    groups = RECIPES["cifar10-small"].with_global_batch_size(2000).param_groups
    assert (groups["matrices"].lr, groups["filters"].lr) == (pytest.approx(2 * 335), pytest.approx(2 * 0.12))


def test_an_unknown_recipe_offers_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match="did you mean mnist"):
        find_recipe("mnits")


def test_a_schedule_is_linear_between_its_points() -> None:
    schedule = Schedule(points=((0.0, 0.2), (0.25, 1.0), (1.0, 0.0)))
    factors = [schedule.factor(step, 101) for step in range(101)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[25] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.0)
    assert max(factors) == factors[25]
    assert Schedule().factor(0, 1) == 1.0
