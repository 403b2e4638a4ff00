"""Recipes are complete, frozen and found by name."""

import dataclasses

import pytest
import torch

from trainer.data import dataset_names
from trainer.errors import ConfigError
from trainer.models import build_network
from trainer.recipes import PRETRAINED, PRETRAINED_PREFIX, RECIPES, Recipe, Schedule, find_recipe


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_recipe_names_a_known_data_set_and_network(recipe: Recipe) -> None:
    assert recipe.dataset in dataset_names()
    if recipe.network.startswith(PRETRAINED_PREFIX):
        assert recipe.network.removeprefix(PRETRAINED_PREFIX) in PRETRAINED  # building it would fetch its weights
    elif recipe.network == "airbench":
        build_network(recipe.network, num_channels=3, image_size=32, num_classes=10, widths=recipe.widths)
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
    assert recipe.as_computed_on(cpu) == dataclasses.replace(recipe, precision="float32")


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
