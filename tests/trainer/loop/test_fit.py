"""The loop in one process: a golden curve, exact accounts, and what must not matter."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainer.loop.fit as fit_module
from tests.conftest import ROOT, fill
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.errors import CheckpointError, Interrupted
from trainer.loop.fit import fit
from trainer.loop.learner import Learner
from trainer.loop.run import Run, restore
from trainer.loop.samples import EpochSamples
from trainer.loop.saving import SaveEvery, save
from trainer.progress import Progress
from trainer.ranks.watchdog import SLOW_PHASE_TIMEOUT_S
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Augment, Recipe
from trainer.records.checkpoint import weights_sha256
from trainer.records.metrics import read_metrics
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.train import setup

GOLDEN = ROOT / "tests" / "assets" / "mnist-mini-seed0-losses.json"
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=2)
SHORT = replace(RECIPES["mnist"], dataset="mnist-mini", epochs=2, precision="float32")


class Apart(World):
    """A rank that waits for nobody, and keeps what it would have told the others."""

    seen: list[torch.Tensor]

    def broadcast_object(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        return

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        return

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        self.seen.append(sums.clone())
        return sums


def make_run(recipe: Recipe, dataset: Dataset, folder: Path, *, world: World = ALONE, seed: int = 0) -> Run:
    config = TrainConfig(run_dir=folder, seed=seed)
    run_folder = RunFolder.plan(config, recipe, dataset, world)
    run_folder.enter(config.resume, world)
    return setup(recipe, dataset, run_folder, world, Progress(is_main=False))


def losses(run: Run, num_steps: int, save_every: SaveEvery | None = None) -> list[float]:
    """Train that many steps; the mean loss of each."""
    seen: list[float] = []
    step = run.learner.step

    def watched(batch: Any) -> torch.Tensor:
        result = step(batch)
        seen.append(result[0].item() / len(batch.indices))
        if len(seen) == num_steps:
            raise StopIteration
        return result

    run.learner = replace(run.learner, step=watched)
    with StopRequest() as stop, pytest.raises(StopIteration):
        fit(run, stop, save_every or SaveEvery())
    return seen


def epoch_lines(folder: Path) -> list[dict[str, Any]]:
    """What is logged of each epoch but the time."""
    lines = [line for line in read_metrics(folder) if line["kind"] == "epoch"]
    return [{name: value for name, value in line.items() if name not in ("time", "seconds")} for line in lines]


def test_the_first_losses_are_the_golden_ones(mini: Dataset, tmp_path: Path) -> None:
    """Rounding differs between machines and torch versions; anything else that changes the arithmetic shows here."""
    golden = json.loads(GOLDEN.read_text())[:25]  # later ones magnify the rounding
    mine = losses(make_run(SHORT, mini, tmp_path / "run"), len(golden))
    assert mine == pytest.approx(golden, rel=2e-3)


def test_the_accounts_are_exact(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(SHORT, global_batch_size=64)  # 4,500 training images: 70 whole batches and one of 20
    run = make_run(recipe, mini, tmp_path / "run")
    with StopRequest() as stop:
        fit(run, stop)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [50, 100]
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [71, 142]
    assert run.position.step == run.num_steps == 142
    assert all(0 <= line["accuracy"] <= 1 for line in lines if line["kind"] == "step")
    assert run.checkpoints.newest() == tmp_path / "run" / "checkpoints" / "step-00000142"


def test_the_same_seed_gives_the_same_weights_and_another_one_others(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(SHORT, epochs=1, augment=Augment(shift=2, flip="alternating"))
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        run = make_run(recipe, mini, tmp_path / str(number), seed=seed)
        with StopRequest() as stop:
            fit(run, stop)
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1] != digests[2]


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


@pytest.mark.parametrize("num_images", [1, 2, 7, 100])
def test_ranks_that_share_a_batch_add_up_to_it(num_images: int, mini: Dataset, tmp_path: Path) -> None:
    """The gradient of the whole batch is the sum of the ranks' gradients, also where some rank has no image."""
    totals = []
    for size in (1, 3):
        sums: list[torch.Tensor] = []
        for rank in range(size):
            world = Apart(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), num_threads=2)
            object.__setattr__(world, "seen", sums)  # the base is frozen
            run = make_run(SHORT, mini, tmp_path / f"{size}", world=world)
            samples = EpochSamples(
                indices=run.train_indices[:num_images],
                augment_params=torch.zeros(num_images, 6),
                dropout_seeds=torch.zeros(num_images),
            )
            run.learner.step(samples.batch(0, num_images, torch.tensor(1.0), world))
        totals.append(torch.stack(sums).sum(dim=0))
    assert torch.allclose(totals[0], totals[1], atol=1e-5)


def test_a_save_that_fails_does_not_end_the_training(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(replace(SHORT, epochs=1), mini, tmp_path / "run")
    run.progress = Progress(is_main=True)
    saves = []
    write = run.checkpoints.save

    def sometimes(step: int, state: dict[str, Any]) -> None:
        saves.append(step)
        if len(saves) < 3:
            raise CheckpointError("no room")
        write(step, state)

    monkeypatch.setattr(run.checkpoints, "save", sometimes)
    with StopRequest() as stop:
        fit(run, stop, SaveEvery(steps=1))
    assert capsys.readouterr().out.count("warning: no room; the training continues") == 2
    assert run.position.step == run.num_steps
    assert run.checkpoints.newest() == tmp_path / "run" / "checkpoints" / "step-00000045"


def test_a_full_disk_does_not_end_the_training(
    mini: Dataset, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(SHORT, mini, small_disk / "run")
    run.progress = Progress(is_main=True)
    filler, step = fill(small_disk), run.learner.step

    def with_room_later(batch: Any) -> torch.Tensor:
        if run.position.step == 60:
            filler.unlink()
        return step(batch)

    run.learner = replace(run.learner, step=with_room_later)
    with StopRequest() as stop:
        fit(run, stop, SaveEvery(steps=10))
    output = capsys.readouterr().out
    assert output.count("warning: cannot write the metrics") == 1
    assert "warning: cannot save a checkpoint" in output
    assert run.checkpoints.newest() == small_disk / "run" / "checkpoints" / "step-00000090"
    lines = read_metrics(small_disk / "run")
    assert [(line["kind"], line["step"]) for line in lines] == [("epoch", 45), ("step", 50), ("epoch", 90)]


def test_what_is_saved_is_not_written_again(mini: Dataset, tmp_path: Path) -> None:
    """A kill in between would find neither the old nor the new one."""
    run = make_run(replace(SHORT, epochs=1), mini, tmp_path / "run")
    with StopRequest() as stop:
        fit(run, stop, SaveEvery(steps=45))
    manifest = tmp_path / "run" / "checkpoints" / "step-00000045" / "manifest.json"
    before = manifest.stat().st_ino
    again = make_run(replace(SHORT, epochs=1), mini, tmp_path / "run")
    assert restore(again)
    with StopRequest() as stop:
        fit(again, stop)
    assert manifest.stat().st_ino == before


def test_when_a_checkpoint_is_due() -> None:
    every = SaveEvery(seconds=10, steps=7)
    assert [step for step in range(1, 22) if every.is_due(step, 0.0, 0)] == [7, 14, 21]
    # The first ones of a sitting come sooner, so that little is lost at its start.
    times = [next(t / 10 for t in range(1000) if every.is_due(1, t / 10, saved)) for saved in range(6)]
    assert times == [2, 4, 8, 10, 10, 10]
    assert not SaveEvery(seconds=10).is_due(7, 0.9, 0)


def test_saving_at_every_step_does_not_change_the_weights(mini: Dataset, tmp_path: Path) -> None:
    digests = []
    for number, every in enumerate((SaveEvery(), SaveEvery(steps=1))):
        run = make_run(replace(RECIPES["mnist-fast"], epochs=1), mini, tmp_path / str(number))
        with StopRequest() as stop:
            fit(run, stop, every)
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1]


def test_a_run_goes_on_from_the_end_of_an_epoch(mini: Dataset, tmp_path: Path) -> None:
    """What is saved after an epoch's last step has its validation and its line behind it, and new sums before it."""
    whole, first = (make_run(SHORT, mini, tmp_path / name) for name in ("whole", "parts"))
    with StopRequest() as stop:
        fit(whole, stop)
    losses(first, 50, SaveEvery(steps=45))
    second = make_run(SHORT, mini, tmp_path / "parts")
    assert restore(second)
    assert second.position.step == 45
    with StopRequest() as stop:
        fit(second, stop)
    assert epoch_lines(tmp_path / "parts") == epoch_lines(tmp_path / "whole")


def test_who_is_stopped_in_the_last_step_has_trained_to_the_end(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SHORT, mini, tmp_path / "run")
    with StopRequest() as stop:
        step = run.learner.step

        def watched(batch: Any) -> torch.Tensor:
            if run.position.step == 89:
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


def test_checkpoints_of_a_network_that_has_changed_since_are_refused(mini: Dataset, tmp_path: Path) -> None:
    save(make_run(SHORT, mini, tmp_path / "run"))
    again = make_run(SHORT, mini, tmp_path / "run")
    again.learner.model.network.register_parameter("new", nn.Parameter(torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"of another network than lecture is now \(see network.new\)"):
        restore(again)


def test_a_run_goes_on_in_the_middle_of_an_epoch(mini: Dataset, tmp_path: Path) -> None:
    whole = make_run(SHORT, mini, tmp_path / "whole")
    with StopRequest() as stop:
        fit(whole, stop)
    first = make_run(SHORT, mini, tmp_path / "parts")
    losses(first, 30)  # the step that raised is not counted
    save(first)
    second = make_run(SHORT, mini, tmp_path / "parts")
    assert restore(second)
    assert second.position.step == first.position.step
    assert torch.equal(second.position.totals, first.position.totals)


def test_patience_follows_the_steps_and_is_short_from_the_second_epoch_on(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others may wait for this rank: told by the longest of its recent steps, also in an epoch's first."""
    monkeypatch.setattr(fit_module, "HANG_AFTER_S", 0.5)
    run = make_run(replace(SHORT, global_batch_size=2250), mini, tmp_path / "run")  # two steps an epoch
    watchdog, step, look = run.world.watchdog, run.learner.step, run.learner.predict_one_view
    in_steps, in_validations = [], []

    def slow(batch: Any) -> torch.Tensor:
        in_steps.append(watchdog.timeout_s)
        time.sleep(1.0)
        return step(batch)

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        in_validations.append(watchdog.timeout_s)
        return look(pixels)

    run.learner = replace(run.learner, step=slow)
    monkeypatch.setattr(Learner, "predict_one_view", lambda learner, pixels: watched(pixels))
    with StopRequest() as stop:
        fit(run, stop)
    first, *others = in_steps
    assert first == watchdog.timeout_s == SLOW_PHASE_TIMEOUT_S
    assert len(others) == 3
    assert all(3.0 <= patience < 60 for patience in others)
    assert in_validations == [60.0, 60.0]
