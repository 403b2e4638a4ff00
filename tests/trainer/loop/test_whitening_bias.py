"""Tests of `whitening_bias_until`: the bias of airbench's first layer is trained in the first steps alone."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.loop.runs import ALONE, losses, make_run
from tests.trainer.loop.test_samples import sums_on_ranks
from trainer.config import TrainConfig
from trainer.data import Dataset, ImageSet
from trainer.errors import ConfigError
from trainer.loop.fit import fit
from trainer.loop.graphed_step import GraphedStepByKind
from trainer.loop.run import Run, restore
from trainer.loop.saving import SaveInterval
from trainer.loop.sources import ResidentSource
from trainer.loop.step import StepKind
from trainer.recipes import RECIPES, ParamGroup, Recipe
from trainer.records.checkpoint import weights_sha256
from trainer.signals import StopRequest

FREEZING = replace(
    RECIPES["cifar10-small"],
    dataset="mnist-mini",
    epochs=2,
    widths=(4, 4, 8),
    global_batch_size=100,
    precision="float32",
    clip_norm=1.0,
    ema_decay=0.5,
    whitening_bias_until=0.6,
)
"""6 steps of few images, with weight decay, momentum, clipping and an average; the bias is trained in the first 4."""
FROZEN = StepKind(trains_whitening_bias=False)
BIAS = "network.whiten.bias"


@pytest.fixture
def few(mini: Dataset) -> Dataset:
    """330 images, of which 297 are trained on."""
    return replace(mini, train=ImageSet(mini.train.images[:330], mini.train.labels[:330]))


def digest_after(run: Run) -> str:
    with StopRequest() as stop:
        fit(run, stop)
    return weights_sha256(run.learner.model)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_bias_stays_as_it_is_after_its_share_of_the_run(optimizer: Any, few: Dataset, tmp_path: Path) -> None:
    vectors = ParamGroup(lr=0.01, momentum=0.8, weight_decay=0.5, optimizer=optimizer)
    recipe = replace(FREEZING, param_groups={**FREEZING.param_groups, "vectors": vectors})
    run = make_run(recipe, few, tmp_path)
    source, states = ResidentSource(run), []
    run.learner.model.train()
    for step in range(run.num_steps):
        run.learner.step(source.batch(step))
        states.append({name: value.clone() for name, value in run.learner.model.state_dict().items()})
    changes = [not torch.equal(old[BIAS], new[BIAS]) for old, new in itertools.pairwise(states)]
    assert changes == [True, True, True, False, False]
    others = [name for name, weight in run.learner.model.named_parameters() if weight.requires_grad]
    assert len(others) > 10
    assert BIAS not in others
    assert all(not torch.equal(states[4][name], states[3][name]) for name in others)  # the last step's rate is 0


def test_no_gradient_before_the_second_layer_is_computed_any_more(few: Dataset, tmp_path: Path) -> None:
    run, needs_gradient = make_run(FREEZING, few, tmp_path), []
    second = dict(run.learner.model.network.named_modules())["stages.0.conv1"]
    second.register_forward_pre_hook(lambda _, inputs: needs_gradient.append(inputs[0].requires_grad))
    run.learner.model.train()
    assert run.kinds == [StepKind(), FROZEN]
    for kind in (*run.kinds, StepKind()):  # and back, as benchmarks do
        run.learner.step(replace(ResidentSource(run).batch(0), kind=kind))
    assert needs_gradient == [True, False, True]


@pytest.mark.parametrize("saved_at", [2, 5])
def test_a_run_that_was_stopped_before_or_after_the_switch_ends_in_the_same_weights(
    saved_at: int, few: Dataset, tmp_path: Path
) -> None:
    losses(make_run(FREEZING, few, tmp_path / "stopped"), saved_at + 1, SaveInterval(steps=saved_at))
    again = make_run(FREEZING, few, tmp_path / "stopped")
    assert restore(again)
    assert again.state.step == saved_at
    assert digest_after(again) == digest_after(make_run(FREEZING, few, tmp_path / "whole"))


@pytest.mark.parametrize(
    "recipe",
    [
        replace(FREEZING, whitening_bias_until=1.0),
        replace(FREEZING, network="compact", widths=(4, 4, 4, 8)),
        replace(FREEZING, freeze_until="stages.1"),
    ],
)
def test_all_steps_are_of_one_kind(recipe: Recipe, few: Dataset, tmp_path: Path) -> None:
    """Where the bias is trained to the end, where there is none, and where it is frozen from the start."""
    assert make_run(recipe, few, tmp_path).kinds == [StepKind()]


def test_a_step_has_the_same_bits_on_any_number_of_ranks(mini: Dataset, tmp_path: Path) -> None:
    """Under virtual shards."""

    def sums_of(size: int) -> torch.Tensor:
        return sums_on_ranks(size, FREEZING, mini, tmp_path, FROZEN)

    alone = sums_of(1)
    assert alone[:8].count_nonzero() == 0  # in the place of the bias's gradient
    for size in (2, 4):
        assert torch.equal(sums_of(size), alone)


def test_the_share_is_that_of_the_steps() -> None:
    for name in ("cifar10", "cifar10-fast", "cifar10-96"):
        assert [RECIPES[name].trains_whitening_bias(step, 8) for step in range(8)] == [True] * 3 + [False] * 5
    assert all(RECIPES["cifar10-small"].trains_whitening_bias(step, 8) for step in range(8))
    recipe = TrainConfig(recipe="cifar10", set=("whitening_bias_until=0",)).resolve()
    assert not recipe.trains_whitening_bias(0, 8)
    with pytest.raises(ConfigError, match=r"whitening_bias_until 1\.5: must be at least 0 and at most 1"):
        TrainConfig(recipe="cifar10", set=("whitening_bias_until=1.5",)).resolve()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_graphs_of_both_kinds_equal_the_eager_steps(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in `World.join` on a GPU
    recipe = replace(FREEZING, epochs=1, widths=(16, 32, 32), precision="bfloat16")
    digests = []
    for is_graphed in (False, True):
        run = make_run(recipe, mini, tmp_path, world=replace(ALONE, device=torch.device("cuda", 0)))
        graphed, source = run.learner.step, ResidentSource(run)
        assert isinstance(graphed, GraphedStepByKind)
        run.learner.model.train()
        for number in range(run.num_steps):
            (graphed if is_graphed else run.learner.train_step)(source.batch(number))
        assert [step._graph is not None for step in graphed._steps.values()] == [True, True] * is_graphed
        run.learner.release()
        source.close()
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1]
