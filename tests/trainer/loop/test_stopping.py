"""Early stopping on validation images, and keeping the weights of the best epoch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.loop.runs import SHORT, losses, make_run
from trainer.config import EvaluateConfig, TrainConfig
from trainer.data import Dataset, ImageSet
from trainer.evaluation.evaluate import Evaluation
from trainer.loop.fit import fit
from trainer.loop.run import Run, restore
from trainer.loop.saving import SaveInterval
from trainer.loop.stopping import score_of
from trainer.progress import Progress
from trainer.recipes import Recipe
from trainer.records.checkpoint import weights_sha256
from trainer.reopen import evaluate_run
from trainer.signals import StopRequest
from trainer.train import train

LONG = replace(SHORT, epochs=9, patience=2, keep_best=True, best_by="loss")
VALIDATION_LOSSES = [2.0, 1.5, 1.6, 1.4, 1.5, 1.6, 1.0, 1.0, 1.0]
"""Of the epochs: the fourth is the best when the sixth is over, and the seventh would be better."""


@pytest.fixture
def few(mini: Dataset) -> Dataset:
    """Two steps an epoch."""
    return replace(mini, train=ImageSet(mini.train.images[:200], mini.train.labels[:200]))


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Makes the validation losses those above; receives the digest of the weights that each epoch validates."""
    from trainer.loop import fit as loop

    seen: dict[int, str] = {}
    runs: list[Run] = []
    evaluate, init = loop.evaluate, loop.TrainingLoop.__init__

    def watched(predict: Any, *arguments: Any, **options: Any) -> Evaluation:
        run = runs[-1]
        epoch = run.num_epochs_done
        seen[epoch] = weights_sha256(run.learner.evaluated_model)
        return replace(evaluate(predict, *arguments, **options), loss=VALIDATION_LOSSES[epoch - 1])

    def remember(self: Any, run: Run, *arguments: Any) -> None:
        runs.append(run)
        init(self, run, *arguments)

    monkeypatch.setattr(loop, "evaluate", watched)
    monkeypatch.setattr(loop.TrainingLoop, "__init__", remember)
    return seen


def trained(recipe: Recipe, dataset: Dataset, folder: Path) -> Run:
    run = make_run(recipe, dataset, folder)
    run.progress = Progress(is_main=True)
    with StopRequest() as stop:
        fit(run, stop)
    return run


@pytest.mark.parametrize(
    ("changes", "num_epochs", "kept"),
    [
        ({}, 6, 4),
        ({"ema_decay": 0.7}, 6, 4),
        ({"keep_best": False}, 6, 6),
        ({"patience": 0}, 9, 7),  # the first of equally good epochs
        ({"patience": 3}, 9, 7),
        ({"patience": 0, "keep_best": False}, 9, 9),
    ],
)
def test_a_training_ends_when_the_validation_stalls_with_the_weights_of_the_best_epoch(  # noqa: PLR0913
    changes: dict[str, Any],
    num_epochs: int,
    kept: int,
    few: Dataset,
    tmp_path: Path,
    epochs: dict[int, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trained(replace(LONG, **changes), few, tmp_path / "run")
    assert (run.num_epochs_done, list(epochs)) == (num_epochs, list(range(1, num_epochs + 1)))
    assert weights_sha256(run.learner.model) == epochs[kept]
    output = capsys.readouterr().out
    assert (f"the training ends early, after epoch {num_epochs} of 9" in output) is (num_epochs < 9)
    assert (f"has the weights of epoch {kept} of {num_epochs}" in output) is run.recipe.keep_best


@pytest.mark.parametrize("num_steps", [9, 13])  # in the epoch after the best one, and at the end of the last one
def test_the_decision_is_the_same_after_a_restart(
    num_steps: int, few: Dataset, tmp_path: Path, epochs: dict[int, str]
) -> None:
    first = make_run(LONG, few, tmp_path / "run")
    if num_steps < 12:
        losses(first, num_steps, SaveInterval(steps=1))
    else:
        with StopRequest() as stop:
            fit(first, stop)
    again = make_run(LONG, few, tmp_path / "run")
    assert restore(again)
    with StopRequest() as stop:
        fit(again, stop)
    assert (again.num_epochs_done, weights_sha256(again.learner.model)) == (6, epochs[4])
    opened = make_run(LONG, few, tmp_path / "run")  # as `evaluate` and `export` open a run
    restore(opened)
    opened.use_final_weights()
    assert weights_sha256(opened.learner.model) == epochs[4]


@pytest.mark.parametrize(
    ("best_by", "better"), [("accuracy", "often"), ("balanced-accuracy", "evenly"), ("loss", "surely")]
)
def test_the_recipe_says_which_result_is_better(best_by: Any, better: str) -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)

    def validation(predicted: list[int], loss: float) -> Evaluation:
        ones = torch.ones(10)
        return Evaluation(
            labels=labels, predicted=torch.tensor(predicted), confidence=ones, label_probability=ones, loss=loss
        )

    results = {
        "often": validation([0] * 10, 0.9),
        "evenly": validation([1] * 3 + [0] * 5 + [1] * 2, 0.9),
        "surely": validation([1] * 8 + [0] * 2, 0.1),
    }
    assert min(results, key=lambda name: score_of(results[name], best_by, ("a", "b"))) == better
    assert score_of(validation([0] * 10, 0.8), best_by, ("a", "b")) < score_of(results["often"], best_by, ("a", "b"))


def test_a_stopped_run_says_so_in_its_result_and_is_evaluated_as_it_was_kept(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, nothing_learned = tmp_path / "run", [f"param_groups.{kind}.lr=0" for kind in SHORT.param_groups]
    config = TrainConfig(
        dataset="mnist-mini",
        data_dir=data_dir,
        run_dir=folder,
        epochs=9,
        global_batch_size=1500,
        set=("patience=1", "keep_best=true", "clip_norm=1", "ema_decay=0.5", *nothing_learned),
        export=False,
        device="cpu",
    )
    train(config)
    result = json.loads((folder / "result.json").read_text())
    assert (result["best_epoch"], result["epochs"], result["steps"]) == (1, 2, 6)
    report = " ".join((folder / "report.html").read_text().split())
    assert "Its weights are those of epoch 1, which has the best validation result." in report
    capsys.readouterr()
    evaluate_run(EvaluateConfig(run=folder, data_dir=data_dir, device="cpu"))  # refuses other weights than the result's
    num_wrong = round(500 * (1 - result["val_accuracy"]))
    assert f"({num_wrong} of 500 wrong" in capsys.readouterr().out
