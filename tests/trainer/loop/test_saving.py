"""Checkpoints during a training: when, how often, and what a failure does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.loop.runs import SHORT, make_run
from trainer.data import Dataset
from trainer.errors import CheckpointError
from trainer.loop.fit import fit
from trainer.loop.run import restore
from trainer.loop.saving import SaveInterval, save
from trainer.progress import Progress
from trainer.recipes import RECIPES
from trainer.records.checkpoint import weights_sha256
from trainer.signals import StopRequest


def test_when_a_checkpoint_is_due() -> None:
    every = SaveInterval(seconds=10, steps=7)
    assert [step for step in range(1, 22) if every.is_due(step, 0.0, 0)] == [7, 14, 21]
    # The first checkpoints of a session follow sooner, so that little is lost at its start.
    times = [next(t / 10 for t in range(1000) if every.is_due(1, t / 10, saved)) for saved in range(6)]
    assert times == [2, 4, 8, 10, 10, 10]
    assert not SaveInterval(seconds=10).is_due(7, 0.9, 0)


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
        fit(run, stop, SaveInterval(steps=1))
    assert capsys.readouterr().out.count("warning: no room; the training continues") == 2
    assert run.state.step == run.num_steps
    assert run.checkpoints.newest() == tmp_path / "run" / "checkpoints" / "step-00000045"


def test_a_run_whose_folder_is_moved_while_it_trains_can_continue_in_both(mini: Dataset, tmp_path: Path) -> None:
    """The folder came back with checkpoints alone, and no run could continue in it."""
    run = make_run(replace(SHORT, epochs=1), mini, tmp_path / "run")
    save(run)
    (tmp_path / "run").rename(tmp_path / "moved")
    run.state.step = 1
    save(run)
    for name, step in (("run", 1), ("moved", 0)):
        again = make_run(replace(SHORT, epochs=1), mini, tmp_path / name)
        assert restore(again)
        assert again.state.step == step


def test_a_saved_step_is_not_saved_again(mini: Dataset, tmp_path: Path) -> None:
    """A kill between removing and renaming would leave no checkpoint of the step."""
    run = make_run(replace(SHORT, epochs=1), mini, tmp_path / "run")
    with StopRequest() as stop:
        fit(run, stop, SaveInterval(steps=45))
    manifest = tmp_path / "run" / "checkpoints" / "step-00000045" / "manifest.json"
    before = manifest.stat().st_ino
    again = make_run(replace(SHORT, epochs=1), mini, tmp_path / "run")
    assert restore(again)
    with StopRequest() as stop:
        fit(again, stop)
    assert manifest.stat().st_ino == before


def test_saving_at_every_step_does_not_change_the_weights(mini: Dataset, tmp_path: Path) -> None:
    digests = []
    for number, every in enumerate((SaveInterval(), SaveInterval(steps=1))):
        run = make_run(replace(RECIPES["mnist-fast"], epochs=1), mini, tmp_path / str(number))
        with StopRequest() as stop:
            fit(run, stop, every)
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1]
