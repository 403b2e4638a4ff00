"""The moving average of the weights: its arithmetic, and what a run does with it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.loop.runs import SHORT, losses, make_run
from trainer.data import Dataset, ImageSet
from trainer.loop.ema import WeightAverage
from trainer.loop.fit import fit
from trainer.loop.run import restore
from trainer.loop.saving import SaveInterval
from trainer.recipes import RECIPES
from trainer.records.checkpoint import weights_sha256
from trainer.records.metrics import read_metrics
from trainer.signals import StopRequest

# Batch norm, so that there are buffers, and steps enough to leave the start.
AVERAGED = replace(
    RECIPES["mnist-fast"], dataset="mnist-mini", epochs=2, global_batch_size=60, precision="float32", ema_decay=0.8
)


@pytest.fixture
def few(mini: Dataset) -> Dataset:
    return replace(mini, train=ImageSet(mini.train.images[:400], mini.train.labels[:400]))


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_one_written_out(warmup: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.5, warmup=warmup)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(8):
        model(torch.randn(4, 3)).sum().backward()  # changes the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step)) if warmup else 0.5
        for name, tensor in model.state_dict().items():
            kept = decay * expected[name] + (1 - decay) * tensor
            expected[name] = kept if tensor.is_floating_point() else tensor.clone()
    for name, tensor in average.model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_the_average_is_validated_and_becomes_the_trained_model(few: Dataset, tmp_path: Path) -> None:
    run = make_run(AVERAGED, few, tmp_path / "run")
    plain = make_run(replace(AVERAGED, ema_decay=0.0), few, tmp_path / "plain")
    average = run.learner.average
    assert average is not None
    for each in (run, plain):
        with StopRequest() as stop:
            fit(each, stop)
    assert weights_sha256(run.learner.model) == weights_sha256(average.model) != weights_sha256(plain.learner.model)
    validation = run.learner.evaluate(run.validation_images, run.validation_indices, run.world)
    last = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "epoch"][-1]
    assert (last["val_loss"], last["val_accuracy"]) == (validation.loss, validation.accuracy)
    saved = run.checkpoints.load_newest()
    assert saved is not None  # the trained weights are in the checkpoint, too: a run continues from them
    for name, tensor in plain.learner.model.state_dict().items():
        assert torch.equal(saved["model"][name], tensor), name


def test_a_run_with_an_average_continues_exactly(few: Dataset, tmp_path: Path) -> None:
    whole, first = (make_run(AVERAGED, few, tmp_path / name) for name in ("whole", "parts"))
    with StopRequest() as stop:
        fit(whole, stop)
    losses(first, 6, SaveInterval(steps=5))
    second = make_run(AVERAGED, few, tmp_path / "parts")
    assert restore(second)
    assert second.state.step == 5
    with StopRequest() as stop:
        fit(second, stop)
    assert weights_sha256(second.learner.model) == weights_sha256(whole.learner.model)
    opened = make_run(AVERAGED, few, tmp_path / "parts")  # as `evaluate` and `export` open a run
    restore(opened)
    opened.use_final_weights()
    assert weights_sha256(opened.learner.model) == weights_sha256(whole.learner.model)


def test_a_larger_batch_averages_over_the_same_images() -> None:
    assert replace(SHORT, ema_decay=0.99).with_global_batch_size(200).ema_decay == pytest.approx(0.99**2)
    assert SHORT.with_global_batch_size(200).ema_decay == 0
