"""Tests that each stacked seed equals its single run up to rounding, whatever it is stacked with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.loop.runs import make_run
from trainer.data import Dataset
from trainer.errors import DivergenceError
from trainer.loop.run import Run
from trainer.loop.samples import EpochSamples
from trainer.recipes import RECIPES, Augment, Recipe
from trainer.records.checkpoint import Checkpoints
from trainer.studies.stacked import StackedTrainer, can_stack, measure_throughput, train_alone, train_stacked

PLAIN = replace(RECIPES["mnist"], dataset="mnist-mini", epochs=2, precision="float32")
AUGMENTED = replace(RECIPES["mnist-lenet5"], dataset="mnist-mini", global_batch_size=50, precision="float32")
DROPOUT = replace(RECIPES["mnist-alexnet"], dataset="mnist-mini", global_batch_size=16, precision="float32")
LIGHT = replace(PLAIN, network="lenet5", global_batch_size=500)
NUM_STEPS = 6


def make_runs(recipe: Recipe, mini: Dataset, folder: Path, seeds: tuple[int, ...]) -> list[Run]:
    return [make_run(recipe, mini, folder / f"seed-{seed}", seed=seed) for seed in seeds]


@pytest.mark.parametrize("recipe", [PLAIN, AUGMENTED], ids=lambda recipe: recipe.name)
def test_each_stacked_seed_equals_its_single_run(recipe: Recipe, mini: Dataset, tmp_path: Path) -> None:
    together = make_runs(recipe, mini, tmp_path / "together", (0, 1, 5))
    trainer = StackedTrainer(together)
    trainer.train_steps(trainer.draw(0), num_steps=NUM_STEPS)
    trainer.copy_to_runs()
    for run in together:
        single = make_run(recipe, mini, tmp_path / "alone" / str(run.seed), seed=run.seed)
        initial = {name: tensor.clone() for name, tensor in single.learner.model.state_dict().items()}
        train_alone(single, NUM_STEPS)
        alone = single.learner.model.state_dict()
        for name, tensor in run.learner.model.state_dict().items():
            assert torch.allclose(tensor, alone[name], atol=1e-6), name
        learned = [name for name in alone if name.startswith("network.")]
        assert not any(torch.allclose(alone[name], initial[name], atol=1e-6) for name in learned)


def test_stacked_seeds_drop_the_units_of_their_single_runs(mini: Dataset, tmp_path: Path) -> None:
    def head(draw: Callable[[StackedTrainer], EpochSamples]) -> torch.Tensor:
        runs = make_runs(DROPOUT, mini, tmp_path / "together", (0, 1))
        trainer = StackedTrainer(runs)
        trainer.train_steps(draw(trainer), num_steps=1)
        trainer.copy_to_runs()
        return runs[1].learner.model.state_dict()["network.head.weight"]

    alone = make_run(DROPOUT, mini, tmp_path / "alone", seed=1)
    train_alone(alone, 1)
    expected = alone.learner.model.state_dict()["network.head.weight"]
    assert torch.allclose(head(lambda trainer: trainer.draw(0)), expected, atol=1e-6)
    others = head(lambda trainer: replace(trainer.draw(0), dropout_seeds=trainer.draw(1).dropout_seeds))
    assert not torch.allclose(others, expected, atol=1e-5)


def test_the_number_of_stacked_seeds_changes_nothing(mini: Dataset, tmp_path: Path) -> None:
    found = []
    for seeds in ((0, 1), (4, 1, 2, 3)):
        runs = make_runs(PLAIN, mini, tmp_path / str(len(seeds)), seeds)
        trainer = StackedTrainer(runs)
        trainer.train_steps(trainer.draw(0), num_steps=3)
        trainer.copy_to_runs()
        found.append(runs[1].learner.model.state_dict())
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], atol=1e-6)


def test_each_stacked_seed_keeps_its_own_batch_norm_statistics(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(AUGMENTED, network="bn-nin", global_batch_size=4)
    runs = make_runs(recipe, mini, tmp_path / "together", (0, 1))
    trainer = StackedTrainer(runs)
    trainer.train_steps(trainer.draw(0), num_steps=1)
    trainer.copy_to_runs()
    alone = make_run(recipe, mini, tmp_path / "alone", seed=1)
    train_alone(alone, 1)
    expected = dict(alone.learner.model.named_buffers())
    for name, buffer in runs[1].learner.model.named_buffers():
        assert torch.allclose(buffer, expected[name], atol=1e-5), name


def test_recipes_with_muon_or_mixup_cannot_be_stacked() -> None:
    assert can_stack(RECIPES["mnist"])
    assert not can_stack(RECIPES["mnist-fast"])
    assert not can_stack(replace(RECIPES["mnist"], augment=Augment(mixup=0.2)))


def test_stacked_training_continues_after_its_last_epoch(mini: Dataset, tmp_path: Path) -> None:
    whole = make_runs(LIGHT, mini, tmp_path / "whole", (0, 1))
    stopped = make_runs(LIGHT, mini, tmp_path / "stopped", (0, 1))
    empty, checkpoints = Checkpoints(tmp_path / "a", print), Checkpoints(tmp_path / "b", print)
    train_stacked(whole, empty)
    trainer = StackedTrainer(stopped)
    trainer.train_epoch(0)
    checkpoints.save(trainer.step, {**trainer.state_dict(), "seconds": 1.0})
    train_stacked(make_runs(LIGHT, mini, tmp_path / "stopped", (0, 1)), checkpoints)
    train_stacked(stopped, checkpoints)  # trained to the end already: this only copies the weights
    for one, other in zip(whole, stopped, strict=True):
        mine, theirs = one.learner.model.state_dict(), other.learner.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert one.state.step == one.num_steps


def test_a_seed_that_diverges_is_named(mini: Dataset, tmp_path: Path) -> None:
    trainer = StackedTrainer(make_runs(LIGHT, mini, tmp_path, (3, 4)))
    with torch.no_grad():
        next(iter(trainer._parameters.values()))[1].fill_(float("nan"))
    with pytest.raises(DivergenceError, match="the loss of seed 4 is not finite"):
        trainer.train_epoch(0)


def test_throughput_is_measured_for_one_seed_and_for_several(mini: Dataset, tmp_path: Path) -> None:
    assert measure_throughput(make_runs(PLAIN, mini, tmp_path / "one", (0,)), 2) > 0
    assert measure_throughput(make_runs(PLAIN, mini, tmp_path / "two", (0, 1)), 2) > 0
