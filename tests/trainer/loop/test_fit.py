"""The training loop in one process: golden losses, exact step counts, and exact continuation."""

import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, fill
from tests.trainer.loop.runs import ALONE, SHORT, losses, make_run
from tests.trainer.loop.test_look_ahead import FakeGpu
from trainer.data import Dataset, ImageSet
from trainer.errors import DivergenceError, Interrupted
from trainer.evaluation.baseline import Baseline, TrainingWarning
from trainer.loop.fit import fit
from trainer.loop.learner import Learner
from trainer.loop.look_ahead import LookAhead
from trainer.loop.run import restore
from trainer.loop.saving import SaveInterval
from trainer.loop.stopwatch import Stopwatch
from trainer.progress import Progress
from trainer.ranks.activity import SLOW_PHASE_TIMEOUT_S, Activity
from trainer.recipes import RECIPES, Augment, Recipe
from trainer.records.checkpoint import weights_sha256
from trainer.records.metrics import read_metrics
from trainer.signals import StopRequest

GOLDEN = ROOT / "tests" / "assets" / "mnist-mini-seed0-losses.json"


@pytest.fixture
def few(mini: Dataset) -> Dataset:
    """The first 200 training images of `mini`."""
    return replace(mini, train=ImageSet(mini.train.images[:200], mini.train.labels[:200]))


def epoch_lines(folder: Path) -> list[dict[str, Any]]:
    """The logged lines of the epochs, without times."""
    lines = [line for line in read_metrics(folder) if line["kind"] == "epoch"]
    return [{name: value for name, value in line.items() if name not in ("time", "seconds")} for line in lines]


def test_the_first_losses_are_the_golden_ones(mini: Dataset, tmp_path: Path) -> None:
    """Rounding differs between machines and torch versions; anything else that changes the arithmetic shows here."""
    golden = json.loads(GOLDEN.read_text())[:25]  # later losses magnify the rounding
    mine = losses(make_run(SHORT, mini, tmp_path / "run"), len(golden))
    assert mine == pytest.approx(golden, rel=2e-3)


def test_steps_log_lines_and_checkpoints_are_counted_exactly(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(SHORT, global_batch_size=64)  # 4,500 training images: 70 whole batches and one of 20
    run = make_run(recipe, mini, tmp_path / "run")
    with StopRequest() as stop:
        fit(run, stop)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [50, 100]
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [71, 142]
    assert run.state.step == run.num_steps == 142
    assert all(0 <= line["accuracy"] <= 1 for line in lines if line["kind"] == "step")
    assert run.checkpoints.newest() == tmp_path / "run" / "checkpoints" / "step-00000142"


def test_equal_seeds_give_equal_weights_and_different_seeds_different_ones(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(SHORT, epochs=1, augment=Augment(shift=2, flip="alternating"))
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        run = make_run(recipe, mini, tmp_path / str(number), seed=seed)
        with StopRequest() as stop:
            fit(run, stop)
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1] != digests[2]


def frozen(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with learning rates of 0, which learns nothing."""
    groups = {kind: replace(group, lr=0.0) for kind, group in recipe.param_groups.items()}
    return replace(recipe, param_groups=groups, **changes)


@pytest.mark.parametrize(
    ("changes", "epoch"),
    [({"epochs": 3}, 2), ({"epochs": 1}, 1), ({"epochs": 2, "label_smoothing": 0.2}, 2)],
)
def test_a_training_that_learns_nothing_is_warned_about_once(
    few: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], epoch: int
) -> None:
    run = make_run(frozen(SHORT, **changes), few, tmp_path / "run")
    run.progress = Progress(is_main=True)
    with StopRequest() as stop:
        fit(run, stop)
    lines = capsys.readouterr().out.splitlines()
    warned = [number for number, line in enumerate(lines) if "no better than the class frequencies" in line]
    assert [lines[number].split("the network")[0] for number in warned] == [f"warning: epoch {epoch}: "]
    assert lines[warned[0] - 1].startswith(f"epoch {epoch}/")


NO_GAIN = TrainingWarning(kind="no-gain", text="no gain")
ONE_CLASS = TrainingWarning(kind="one-class", text="one class")


@pytest.mark.parametrize(
    ("last", "retraction"),
    [([], ["epoch 8: the earlier warning about this training no longer holds"]), ([NO_GAIN], [])],
)
def test_each_kind_of_warning_is_logged_once_and_retracted_by_the_last_epoch_alone(
    few: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    last: list[TrainingWarning],
    retraction: list[str],
) -> None:
    """The loss crosses the threshold of a warning several times."""
    found = iter([[NO_GAIN], [], [NO_GAIN, ONE_CLASS], [], [NO_GAIN], [], last])
    monkeypatch.setattr(Baseline, "check", lambda *_: next(found))
    run = make_run(frozen(SHORT, epochs=8), few, tmp_path / "run")
    run.progress = Progress(is_main=True)
    with StopRequest() as stop:
        fit(run, stop)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not re.match(r"epoch \d+/", line)] == [
        "warning: epoch 2: no gain",
        "warning: epoch 4: one class",
        *retraction,
    ]


@pytest.mark.parametrize("name", ["mnist", "mnist-fast"])
def test_a_healthy_training_is_not_warned_about(
    name: str, mini: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch of few steps is the hardest case: its mean loss is that of the beginning."""
    run = make_run(replace(RECIPES[name], epochs=1), mini, tmp_path / "run")
    run.progress = Progress(is_main=True)
    with StopRequest() as stop:
        fit(run, stop)
    assert "warning" not in capsys.readouterr().out


def test_validation_images_are_never_trained_on(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SHORT, mini, tmp_path / "run")
    seen: set[int] = set()
    step = run.learner.step

    def watched(batch: Any) -> torch.Tensor:
        seen.update(batch.indices.tolist())
        return step(batch)

    run.learner = replace(run.learner, step=watched)
    with StopRequest() as stop:
        fit(run, stop)
    assert seen == set(run.train_indices.tolist())
    assert not seen & set(run.validation_indices.tolist())
    assert len(run.validation_indices) == 500


def test_a_full_disk_does_not_end_the_training(
    mini: Dataset, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(SHORT, mini, small_disk / "run")
    run.progress = Progress(is_main=True)
    filler, step = fill(small_disk), run.learner.step

    def with_room_later(batch: Any) -> torch.Tensor:
        if run.state.step == 60:
            filler.unlink()
        return step(batch)

    run.learner = replace(run.learner, step=with_room_later)
    with StopRequest() as stop:
        fit(run, stop, SaveInterval(steps=10))
    output = capsys.readouterr().out
    assert output.count("warning: cannot write the metrics") == 1
    assert "warning: cannot save a checkpoint" in output
    assert run.checkpoints.newest() == small_disk / "run" / "checkpoints" / "step-00000090"
    lines = read_metrics(small_disk / "run")
    assert [(line["kind"], line["step"]) for line in lines] == [("epoch", 45), ("step", 50), ("epoch", 90)]


def test_a_run_continues_from_the_end_of_an_epoch(mini: Dataset, tmp_path: Path) -> None:
    """A checkpoint after an epoch's last step follows its validation and its line, and has empty sums."""
    whole, first = (make_run(SHORT, mini, tmp_path / name) for name in ("whole", "parts"))
    with StopRequest() as stop:
        fit(whole, stop)
    losses(first, 50, SaveInterval(steps=45))
    second = make_run(SHORT, mini, tmp_path / "parts")
    assert restore(second)
    assert second.state.step == 45
    with StopRequest() as stop:
        fit(second, stop)
    assert epoch_lines(tmp_path / "parts") == epoch_lines(tmp_path / "whole")


def test_a_run_that_is_stopped_in_its_last_step_is_trained_to_the_end(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SHORT, mini, tmp_path / "run")
    with StopRequest() as stop:
        step = run.learner.step

        def watched(batch: Any) -> torch.Tensor:
            if run.state.step == 89:
                stop.request(signal.SIGTERM, "")
            return step(batch)

        run.learner = replace(run.learner, step=watched)
        with pytest.raises(Interrupted, match="saved at step 90 of 90"):
            fit(run, stop)
    again = make_run(SHORT, mini, tmp_path / "run")
    assert restore(again)
    with StopRequest() as stop:
        fit(again, stop)
    assert [line["epoch"] for line in epoch_lines(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("save_every", [SaveInterval(steps=4), SaveInterval(seconds=1e9)], ids=["saved", "stopped"])
def test_a_loss_that_is_read_late_is_named_before_the_weights_that_it_spoilt(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: SaveInterval
) -> None:
    """As on a GPU, where a loss is read when a log line or a checkpoint is due, or when the run is stopped."""
    monkeypatch.setattr(torch.cuda, "Event", FakeGpu().event)
    monkeypatch.setattr("trainer.loop.fit.LookAhead", lambda _: LookAhead(torch.device("cuda")))
    run = make_run(SHORT, mini, tmp_path / "run")
    with StopRequest() as stop:
        step = run.learner.step

        def diverging(batch: Any) -> torch.Tensor:
            result = step(batch)
            if run.state.step == 5:
                next(run.learner.model.parameters()).data.fill_(torch.nan)
                if save_every.steps is None:
                    stop.request(signal.SIGTERM, "")
            return result if run.state.step < 5 else result * torch.nan

        run.learner = replace(run.learner, step=diverging)
        with pytest.raises(DivergenceError, match="the loss is nan at step 6; ") as told:
            fit(run, stop, save_every)
    assert ("step-00000004" in str(told.value)) == (save_every.steps == 4)


def test_the_hang_timeout_follows_the_steps_and_is_short_from_the_second_epoch_on(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest of the recent steps decides it, also in the first step of an epoch."""
    world = replace(ALONE, activity=Activity(hang_timeout_s=0.5))
    run = make_run(replace(SHORT, global_batch_size=2250), mini, tmp_path / "run", world=world)  # two steps per epoch
    activity, step, look = run.world.activity, run.learner.step, run.learner.predict
    in_steps, in_validations = [], []

    def slow(batch: Any) -> torch.Tensor:
        in_steps.append(activity.timeout_s)
        time.sleep(1.0)
        return step(batch)

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        in_validations.append(activity.timeout_s)
        return look(pixels)

    run.learner = replace(run.learner, step=slow)
    monkeypatch.setattr(Learner, "predict", lambda learner, pixels: watched(pixels))
    with StopRequest() as stop:
        fit(run, stop)
    first, *others = in_steps
    assert first == activity.timeout_s == SLOW_PHASE_TIMEOUT_S
    assert len(others) == 3
    assert all(3.0 <= timeout_s < 60 for timeout_s in others)
    assert in_validations == [60.0, 60.0]


def test_the_wait_for_a_gpu_at_an_epochs_end_is_one_for_the_other_ranks(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queued steps have collectives: only a rank that is known to wait tells that another one hangs."""
    run, stop, waiting = make_run(SHORT, mini, tmp_path / "run"), Stopwatch.stop, list[bool]()

    def stopped(watch: Stopwatch) -> float:
        waiting.append(run.world.activity.waited_s is not None)
        return stop(watch)

    monkeypatch.setattr(Stopwatch, "stop", stopped)
    with StopRequest() as request:
        fit(run, request)
    assert waiting == [True] * SHORT.epochs
