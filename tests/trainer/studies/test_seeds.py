"""Tests of the study of seeds, end to end on real digits: each seed is a run, evaluated once, and all are shown."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.trainer.records.results import make_result
from trainer.config import TrainConfig
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError, DivergenceError
from trainer.loop.run import Run
from trainer.recipes import RECIPES, Recipe
from trainer.report.figures import style
from trainer.studies.seeds import SeedsConfig, _stack_name, study_seeds
from trainer.studies.seeds_page import SeedResults, make_page
from trainer.studies.trials import TrialContext, open_trial, train_trial
from trainer.train import train


@pytest.fixture
def config(tmp_path: Path, data_dir: Path) -> SeedsConfig:
    return SeedsConfig(
        recipe="mnist-lenet5",
        dataset="mnist-mini",
        runs=3,
        epochs=1,
        stack=1,
        data_dir=data_dir,
        run_dir=tmp_path / "runs" / "study",
        device="cpu",
    )


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_all_seeds_are_trained_evaluated_and_shown(
    config: SeedsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study_seeds(config)
    folder = tmp_path / "runs" / "study"
    result = read(folder / "result.json")
    seeds = [read(folder / f"seed-{seed}/result.json") for seed in range(3)]
    assert result["test_errors_percent"] == [seed["test_errors"] / 10 for seed in seeds]
    assert result["worst"] == max(result["test_errors_percent"])
    assert len({seed["weights_sha256"] for seed in seeds}) == 3
    entries = [json.loads(line) for line in (tmp_path / "runs/ledger.jsonl").read_text().splitlines()]
    assert [entry["seed"] for entry in entries] == [0, 1, 2]  # in the workspace's ledger; the study has none
    assert not (folder / "ledger.jsonl").exists()
    assert (folder / "seeds.csv").read_text().count("\n") == 4
    assert "3 of 3" in capsys.readouterr().out
    # After an interruption before the last seed, the study continues with that seed and gives the same result.
    (folder / "seed-2/result.json").unlink()
    before = (tmp_path / "runs/ledger.jsonl").read_text()
    study_seeds(config)
    assert "2 of 3 seeds are done already" in capsys.readouterr().out
    assert read(folder / "result.json")["test_errors_percent"] == result["test_errors_percent"]
    assert (tmp_path / "runs/ledger.jsonl").read_text() == before  # the same weights are not recorded again
    study_seeds(replace(config, runs=4))  # more seeds later, in the same folder
    assert read(folder / "result.json")["test_errors_percent"][:3] == result["test_errors_percent"]
    assert len(read(folder / "result.json")["test_errors_percent"]) == 4
    study_seeds(replace(config, runs=1))  # fewer runs than before leave none out
    assert read(folder / "result.json")["seeds"] == [0, 1, 2, 3]
    # Another study of the same setting counts all evaluations of the workspace, too.
    other = tmp_path / "runs" / "other"
    study_seeds(replace(config, runs=1, first_seed=100, run_dir=other))
    found = read(other / "result.json")
    assert (found["seeds"], found["runs"], found["runs_outside_the_study"]) == ([100], 5, 4)
    assert found["test_errors_percent"][1:] == read(folder / "result.json")["test_errors_percent"]
    assert "3, seed-3, outside the study" in (other / "seeds.csv").read_text()


def test_a_folder_of_less_than_a_batch_is_not_measured(config: SeedsConfig, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in range(18):
            pixels = random.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "few" / name / f"{number}.png")
    study_seeds(replace(config, dataset=f"folder:{tmp_path / 'few'}", runs=2, stack=0))
    assert len(read(tmp_path / "runs/study/result.json")["test_errors_percent"]) == 2


def test_a_seed_that_diverges_is_counted_and_the_study_continues(
    config: SeedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stacked_seeds_diverge(*rest: Any) -> None:
        raise DivergenceError("training diverged in epoch 1: the loss of seed 1 is not finite")

    def seed_1_diverges(context: TrialContext, recipe: Recipe, seed: int, path: Path) -> Run:
        if seed == 1:
            open_trial(context, recipe, seed, path)
            raise DivergenceError("training diverged in epoch 1: the loss is not finite")
        return train_trial(context, recipe, seed, path)

    monkeypatch.setattr("trainer.studies.seeds.train_stacked", stacked_seeds_diverge)
    monkeypatch.setattr("trainer.studies.seeds.train_trial", seed_1_diverges)
    study_seeds(replace(config, runs=2, stack=2))
    assert "the loss of seed 1 is not finite; the seeds 0, 1 are trained one after another" in capsys.readouterr().out
    result = read(tmp_path / "runs/study/result.json")
    assert (result["seeds"], result["diverged"], result["runs"]) == ([0], [1], 1)
    assert "1 of 2 seeds diverged and have no test error: 1." in (tmp_path / "runs/study/report.html").read_text()
    study_seeds(replace(config, runs=2, stack=2))
    assert "2 of 2 seeds are done already" in capsys.readouterr().out


def test_a_recipe_that_always_diverges_is_an_error(config: SeedsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES[config.recipe]
    wild = {kind: replace(group, lr=1e12) for kind, group in recipe.param_groups.items()}
    monkeypatch.setitem(RECIPES, config.recipe, replace(recipe, param_groups=wild))
    with pytest.raises(DivergenceError, match="all 2 seeds diverged"):
        study_seeds(replace(config, runs=2))


def test_no_training_loop_can_load_test_images(
    config: SeedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def loop(run: Run, *rest: Any) -> None:
        with pytest.raises(ConfigError, match="without its test images"):
            load_test_set(run.dataset)
        raise Started

    monkeypatch.setattr("trainer.train.fit", loop)
    monkeypatch.setattr("trainer.studies.trials.fit", loop)
    known = {"dataset": config.dataset, "data_dir": config.data_dir, "device": config.device}
    with pytest.raises(Started):
        train(TrainConfig(**known, run_dir=tmp_path / "runs" / "lone", export=False))
    with pytest.raises(Started):
        study_seeds(config)


@pytest.mark.slow
def test_stacked_seeds_match_single_runs(config: SeedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # bfloat16, where the processor has it, rounds so coarsely that the weights differ after an epoch.
    monkeypatch.setitem(RECIPES, config.recipe, replace(RECIPES[config.recipe], precision="float32"))
    study_seeds(config)
    study_seeds(replace(config, stack=2, run_dir=tmp_path / "other" / "stacked"))
    alone, stacked = (read(tmp_path / f"{name}/result.json") for name in ("runs/study", "other/stacked"))
    for one, other in zip(alone["test_errors_percent"], stacked["test_errors_percent"], strict=True):
        assert other == pytest.approx(one, abs=1.0)  # rounding errors grow over an epoch
    folders = [tmp_path / f"other/stacked/seed-{seed}" for seed in range(3)]
    results = [read(folder / "result.json") for folder in folders]
    assert [result["stacked"] for result in results] == [2, 2, 1]
    for folder in folders[:2]:  # as if the study had been stopped before their evaluation
        (folder / "result.json").unlink()
    study_seeds(replace(config, stack=2, run_dir=tmp_path / "other" / "stacked"))
    again = [read(folder / "result.json") for folder in folders]
    assert [result["weights_sha256"] for result in again] == [result["weights_sha256"] for result in results]


def test_options_out_of_range_are_refused(config: SeedsConfig) -> None:
    with pytest.raises(ConfigError, match="--runs must be at least 1"):
        study_seeds(replace(config, runs=0))
    with pytest.raises(ConfigError, match="Muon"):
        study_seeds(replace(config, recipe="mnist-fast", stack=2))


def some_seeds(num: int, *, stacked: int = 1, precision: str = "float32") -> SeedResults:
    results = [
        make_result(seed=seed, test_errors=90 + seed, num_test=10_000, stacked=stacked, precision=precision)
        for seed in range(num)
    ]
    return SeedResults(results=results, diverged=[], others=[], num_evaluations=num)


def test_the_page_states_how_close_stacked_seeds_are_to_single_runs() -> None:
    exact = make_page(RECIPES["mnist"], some_seeds(2, stacked=2), {2: 0.0})
    coarse = make_page(RECIPES["mnist"], some_seeds(2, stacked=2, precision="bfloat16"), {2: 0.0})
    assert "1e-6 after some steps in float32." in " ".join(exact.findings)
    assert "here in bfloat16, whose rounding is coarser" in " ".join(coarse.findings)


def test_figures_with_views_and_warnings_are_findings() -> None:
    seeds = some_seeds(3)
    results = [replace(result, test_errors_with_views=result.test_errors - 20) for result in seeds.results[1:]]
    results = [seeds.results[0], replace(results[0], warnings=("it predicts one class",)), results[1]]
    text = " ".join(make_page(RECIPES["mnist-fast"], replace(seeds, results=results), {1: 0.0}).findings)
    assert "With 5 views of each image instead of one: Test error: worst 0.72 %, median 0.71 %, best 0.71 %" in text
    assert "Version 0.1 evaluated 1 of these runs, with 5 views alone" in text
    assert "Seed 1, warning: it predicts one class." in text
    assert "views" not in " ".join(make_page(RECIPES["mnist"], seeds, {1: 0.0}).findings)


def test_the_lectures_figures_are_shown_for_its_own_recipe_only() -> None:
    page = make_page(RECIPES["mnist"], some_seeds(10), {1: 1000.0, 4: 2500.0})
    other = make_page(RECIPES["mnist-fast"], some_seeds(10), {1: 0.0})
    text = " ".join(page.findings)
    assert "worst 0.99 %, median 0.94 %, best 0.90 %" in page.findings[0].replace("0.95", "0.94")
    assert "The lecture's 100 runs: worst 1.3 %, median 1.0 %, best 0.82 %" in text
    assert "4 seeds stacked 2,500 images/s over all of them, 2.50 times the rate" in text
    assert "lecture" not in " ".join(other.findings).lower()
    assert "stacked" not in " ".join(other.findings)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("shift", [-6, 0, 12])  # our median at the lecture's best, as measured, and at its median
def test_labels_overlap_neither_each_other_nor_the_lines(shift: int, narrow: bool) -> None:
    table = (ROOT / "benchmarks/results/seeds-mnist-2026-11-24.csv").read_text().splitlines()
    percents = [float(row["test error, %"]) for row in csv.DictReader(table)]
    seeds = some_seeds(len(percents))
    results = [
        replace(result, test_errors=round(100 * percent) + shift)
        for result, percent in zip(seeds.results, percents, strict=True)
    ]
    (histogram,) = make_page(RECIPES["mnist"], replace(seeds, results=results), {1: 0.0}).figures
    with style():
        figure = histogram.draw(narrow=narrow)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [label.get_window_extent() for label in axes.texts]
    assert len(labels) == 4
    others = labels + [line.get_window_extent() for line in axes.lines]
    for number, label in enumerate(labels):
        assert not any(label.overlaps(other) for other in others[number + 1 :])


def test_the_folder_of_a_stack_has_a_name_that_fits() -> None:
    assert _stack_name([0, 1, 12]) == "stack-0-1-12"
    names = {_stack_name(list(range(first, first + 100))) for first in (0, 10**9)}
    names.add(_stack_name([*range(50), *range(51, 100)]))
    assert len(names) == 3
    assert max(map(len, names)) < 255
