"""Seeds trained together: each member is its lone run, up to rounding, whatever it is stacked with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.test_fit import make_run
from trainer.data import Dataset
from trainer.errors import DivergenceError
from trainer.loop.fit import Run, Samples
from trainer.recipes import RECIPES, Recipe
from trainer.records.checkpoint import Checkpoints
from trainer.studies.stack import Stack, can_stack, lone_steps, measure_rate, train_stack

PLAIN = replace(RECIPES["mnist"], dataset="mnist-mini", epochs=2, precision="float32")
AUGMENTED = replace(RECIPES["mnist-lenet5"], dataset="mnist-mini", global_batch_size=50, precision="float32")
DROPPING = replace(RECIPES["mnist-alexnet"], dataset="mnist-mini", global_batch_size=16, precision="float32")
LIGHT = replace(PLAIN, network="lenet5", global_batch_size=500)
NUM_STEPS = 6


def members(recipe: Recipe, mini: Dataset, folder: Path, seeds: tuple[int, ...]) -> list[Run]:
    return [make_run(recipe, mini, folder / f"seed-{seed}", seed=seed) for seed in seeds]


@pytest.mark.parametrize("recipe", [PLAIN, AUGMENTED], ids=lambda recipe: recipe.name)
def test_each_member_equals_its_lone_run(recipe: Recipe, mini: Dataset, tmp_path: Path) -> None:
    together = members(recipe, mini, tmp_path / "together", (0, 1, 5))
    stack = Stack(together)
    stack.train_steps(stack.draw(0), num_steps=NUM_STEPS)
    stack.copy_to_runs()
    for run in together:
        before = make_run(recipe, mini, tmp_path / "alone" / str(run.seed), seed=run.seed)
        fresh = {name: tensor.clone() for name, tensor in before.learner.model.state_dict().items()}
        lone_steps(before, NUM_STEPS)
        alone = before.learner.model.state_dict()
        for name, tensor in run.learner.model.state_dict().items():
            assert torch.allclose(tensor, alone[name], atol=1e-6), name
        learnt = [name for name in alone if name.startswith("network.")]
        assert not any(torch.allclose(alone[name], fresh[name], atol=1e-6) for name in learnt)


def test_members_drop_what_their_lone_runs_drop(mini: Dataset, tmp_path: Path) -> None:
    def head(samples_of: Callable[[Stack], Samples]) -> torch.Tensor:
        runs = members(DROPPING, mini, tmp_path / "together", (0, 1))
        stack = Stack(runs)
        stack.train_steps(samples_of(stack), num_steps=1)
        stack.copy_to_runs()
        return runs[1].learner.model.state_dict()["network.head.weight"]

    alone = make_run(DROPPING, mini, tmp_path / "alone", seed=1)
    lone_steps(alone, 1)
    known = alone.learner.model.state_dict()["network.head.weight"]
    assert torch.allclose(head(lambda stack: stack.draw(0)), known, atol=1e-6)
    others = head(lambda stack: replace(stack.draw(0), dropout_seeds=stack.draw(1).dropout_seeds))
    assert not torch.allclose(others, known, atol=1e-5)


def test_the_stacks_size_changes_nothing(mini: Dataset, tmp_path: Path) -> None:
    found = []
    for seeds in ((0, 1), (4, 1, 2, 3)):
        runs = members(PLAIN, mini, tmp_path / str(len(seeds)), seeds)
        stack = Stack(runs)
        stack.train_steps(stack.draw(0), num_steps=3)
        stack.copy_to_runs()
        found.append(runs[1].learner.model.state_dict())
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], atol=1e-6)


def test_batch_norm_keeps_each_members_own_statistics(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(AUGMENTED, network="bn-nin", global_batch_size=4)
    runs = members(recipe, mini, tmp_path / "together", (0, 1))
    stack = Stack(runs)
    stack.train_steps(stack.draw(0), num_steps=1)
    stack.copy_to_runs()
    alone = make_run(recipe, mini, tmp_path / "alone", seed=1)
    lone_steps(alone, 1)
    theirs = dict(alone.learner.model.named_buffers())
    for name, buffer in runs[1].learner.model.named_buffers():
        assert torch.allclose(buffer, theirs[name], atol=1e-5), name


def test_muon_is_not_stacked() -> None:
    assert can_stack(RECIPES["mnist"])
    assert not can_stack(RECIPES["mnist-fast"])


def test_a_stack_goes_on_from_its_last_epoch(mini: Dataset, tmp_path: Path) -> None:
    whole = members(LIGHT, mini, tmp_path / "whole", (0, 1))
    stopped = members(LIGHT, mini, tmp_path / "stopped", (0, 1))
    nowhere, checkpoints = Checkpoints(tmp_path / "a", print), Checkpoints(tmp_path / "b", print)
    train_stack(whole, nowhere)
    stack = Stack(stopped)
    stack.train_epoch(0)
    checkpoints.save(stack.step, {**stack.state_dict(), "seconds": 1.0})
    train_stack(members(LIGHT, mini, tmp_path / "stopped", (0, 1)), checkpoints)
    train_stack(stopped, checkpoints)  # trained to its end already: the weights are only handed back
    for one, other in zip(whole, stopped, strict=True):
        mine, theirs = one.learner.model.state_dict(), other.learner.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert one.position.step == one.num_steps


def test_a_member_that_diverges_is_named(mini: Dataset, tmp_path: Path) -> None:
    stack = Stack(members(LIGHT, mini, tmp_path, (3, 4)))
    with torch.no_grad():
        next(iter(stack._parameters.values()))[1].fill_(float("nan"))
    with pytest.raises(DivergenceError, match="the loss of seed 4 is not finite"):
        stack.train_epoch(0)


def test_rates_are_measured_for_one_and_for_several(mini: Dataset, tmp_path: Path) -> None:
    assert measure_rate(members(PLAIN, mini, tmp_path / "one", (0,)), 2) > 0
    assert measure_rate(members(PLAIN, mini, tmp_path / "two", (0, 1)), 2) > 0
