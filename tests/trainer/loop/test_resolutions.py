"""Tests of progressive resolution: smaller images at first, resized by the step."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.loop.runs import ALONE, losses, make_run
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.data.augment import augment_batch, draw_params, resize
from trainer.errors import ConfigError
from trainer.loop.fit import fit
from trainer.loop.graphed_step import GraphedStep, GraphedStepByKind
from trainer.loop.run import restore
from trainer.loop.saving import SaveInterval
from trainer.loop.step import Batch, StepKind
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Augment, Recipe
from trainer.recipes.fields import recipe_from_table, recipe_to_table
from trainer.records.checkpoint import weights_sha256
from trainer.signals import StopRequest

GROWING = replace(
    RECIPES["mnist-fast"],
    epochs=1,
    widths=(4, 4, 4, 8),
    global_batch_size=750,
    precision="float32",
    resolutions=((0.4, 16), (0.7, 20)),
)
"""6 steps: of 16, 16, 20, 20, 28 and 28 pixels."""


def digest_of(recipe: Recipe, mini: Dataset, folder: Path, world: World = ALONE) -> str:
    run = make_run(recipe, mini, folder, world=world)
    with StopRequest() as stop:
        fit(run, stop)
    return weights_sha256(run.learner.model)


def test_the_network_sees_images_that_grow(mini: Dataset, tmp_path: Path) -> None:
    run, seen = make_run(GROWING, mini, tmp_path), []
    run.learner.model.network.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[-1]) if module.training else None
    )
    with StopRequest() as stop:
        fit(run, stop)
    assert seen == [16, 16, 20, 20, 28, 28]


def test_images_are_never_enlarged(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(replace(GROWING, resolutions=((0.4, 24), (0.7, 64))), mini, tmp_path)
    assert [run.kind_of(step).image_size for step in range(6)] == [24, 24, None, None, None, None]


def test_a_run_that_was_stopped_at_a_smaller_resolution_ends_in_the_same_weights(mini: Dataset, tmp_path: Path) -> None:
    losses(make_run(GROWING, mini, tmp_path / "stopped"), 4, SaveInterval(steps=3))
    again = make_run(GROWING, mini, tmp_path / "stopped")
    assert restore(again)
    assert again.state.step == 3
    with StopRequest() as stop:
        fit(again, stop)
    assert weights_sha256(again.learner.model) == digest_of(GROWING, mini, tmp_path / "whole")


@pytest.mark.parametrize("augment", [Augment(), RECIPES["cifar10"].augment, RECIPES["mnist-fast"].augment])
def test_an_image_is_resized_alike_in_every_batch_and_shard(augment: Augment) -> None:
    """So that virtual shards give the same weights on every number of ranks."""
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    params, everything = draw_params(augment, 12, seed=0, epoch=1), torch.arange(12)
    whole = augment_batch(augment, images, everything, params, 24)
    assert whole.shape == (12, 3, 24, 24)
    for part in (slice(0, 3), slice(3, 7), slice(7, 12)):
        assert torch.equal(augment_batch(augment, images, everything[part], params[part], 24), whole[part])
    full = augment_batch(augment, images, everything, params).float()
    assert torch.equal(whole, F.interpolate(full, size=24, mode="bilinear"))
    assert torch.equal(resize(full, 32), full)


def test_recipes_without_resolutions_and_files_of_recipes_stay_as_they_were() -> None:
    assert RECIPES["cifar10"].image_size(0, 100) is None
    recipe = TrainConfig(recipe="cifar10", set=("resolutions=[[0.25,24],[0.5,28]]",)).resolve()
    assert [recipe.image_size(step, 8) for step in range(8)] == [24, 24, 28, 28, None, None, None, None]
    assert recipe_from_table(recipe_to_table(recipe)) == recipe


@pytest.mark.parametrize("value", ["[[0.6,24],[0.3,28]]", "[[1.0,24]]", "[[0,24]]", "[[0.5,0]]"])
def test_impossible_resolutions_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="fractions rising between 0 and 1"):
        TrainConfig(recipe="cifar10", set=(f"resolutions={value}",)).resolve()


@pytest.mark.parametrize(("network", "size"), [("lecture", 20), ("compact", 4)])
def test_a_network_of_one_size_is_refused_before_the_first_step(
    network: str, size: int, mini: Dataset, tmp_path: Path
) -> None:
    recipe = replace(GROWING, network=network, resolutions=((0.5, size),))
    with pytest.raises(ConfigError, match=f"{network} cannot take images of {size} pixels, as resolutions asks"):
        make_run(recipe, mini, tmp_path)


def test_each_kind_of_step_has_a_graph_of_its_own() -> None:
    class Counted:
        def __init__(self) -> None:
            self.seen: list[StepKind] = []
            self.is_released = False

        def __call__(self, batch: Batch) -> torch.Tensor:
            self.seen.append(batch.kind)
            return torch.zeros(2)

        def release(self) -> None:
            self.is_released = True

    made: list[Counted] = []

    def make() -> GraphedStep:
        made.append(Counted())
        return cast(GraphedStep, made[-1])

    step = GraphedStepByKind(make)
    small, frozen, full = StepKind(image_size=24), StepKind(image_size=24, trains_whitening_bias=False), StepKind()
    for kind in (small, small, frozen, full, full):
        step(_batch(kind))
    step.release()
    assert [one.seen for one in made] == [[small, small], [frozen], [full, full]]
    assert all(one.is_released for one in made)


def _batch(kind: StepKind) -> Batch:
    nothing = torch.zeros(0)
    return Batch(
        images=nothing,
        indices=nothing,
        labels=nothing,
        augment_params=nothing,
        dropout_seeds=nothing,
        lr_factor=nothing,
        sizes=(1,),
        num_images=1,
        kind=kind,
    )
