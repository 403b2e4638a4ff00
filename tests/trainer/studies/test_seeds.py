"""Tests of the study of seeds, end to end on real digits: each seed is a run, evaluated once, and all are shown."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from tests.conftest import ROOT
from tests.trainer.data.folder.image_files import put_class
from tests.trainer.records.results import make_result
from trainer.config import TrainConfig
from trainer.data import Dataset, Images
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError, DivergenceError
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.ledger import RecordedEvaluation
from trainer.loop.run import Run
from trainer.recipes import RECIPES
from trainer.records.run_folder import RunFolder
from trainer.report.figures import style
from trainer.results import evaluate_on_test_set
from trainer.studies.seeds import SeedsConfig, study_seeds
from trainer.studies.seeds_page import SeedResults, make_page
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
    printed = capsys.readouterr().out
    assert printed.startswith("3 trainings of 1 epoch each: mnist-lenet5 on mnist-mini, seeds 0 to 2, each evaluated")
    assert "; 3 of 3\n" in printed
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
    # A seed that was trained on other images, or with another network, is not mixed with the others.
    known = (folder / "seed-3/config.json").read_text()
    (folder / "seed-3/config.json").write_text(known.replace(seeds[0]["dataset_sha256"], "0" * 64))
    with pytest.raises(ConfigError, match="seed-3 is of another run: its dataset_sha256"):
        study_seeds(config)
    (folder / "seed-3/config.json").write_text(known)
    # A study that was moved without the ledger says so.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere / "study")
    capsys.readouterr()
    study_seeds(replace(config, run_dir=elsewhere / "study"))
    missing = (
        f"{elsewhere / 'ledger.jsonl'} holds 0 evaluations on this test set, but {elsewhere / 'study'}/seed-3 counted 4"
    )
    assert (
        capsys.readouterr().out.count(f"warning: {missing}: entries are missing; restore the ledger, or append ") == 1
    )
    # Another study of the same setting counts all evaluations of the workspace, too.
    other = tmp_path / "runs" / "other"
    study_seeds(replace(config, runs=1, first_seed=100, run_dir=other))
    found = read(other / "result.json")
    assert (found["seeds"], found["runs"], found["runs_outside_the_study"]) == ([100], 5, 4)
    assert found["test_errors_percent"][1:] == read(folder / "result.json")["test_errors_percent"]
    assert "3, seed-3, outside the study" in (other / "seeds.csv").read_text()


def test_a_seed_that_diverges_is_counted_and_the_study_continues(
    config: SeedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = evaluate_on_test_set

    def seed_1_diverges(run: Run, dataset: Dataset) -> tuple[Images, Evaluation, RecordedEvaluation | None]:
        if run.seed == 1:
            raise DivergenceError("no test accuracy: the outputs are not finite")
        return evaluate(run, dataset)

    monkeypatch.setattr("trainer.studies.seeds.evaluate_on_test_set", seed_1_diverges)
    study_seeds(replace(config, runs=2))
    result = read(tmp_path / "runs/study/result.json")
    assert (result["seeds"], result["diverged"], result["runs"]) == ([0], [1], 1)
    assert "1 of 2 seeds diverged and have no test error: 1." in (tmp_path / "runs/study/report.html").read_text()
    study_seeds(replace(config, runs=2, stack=2))
    assert "2 of 2 seeds are done already" in capsys.readouterr().out


def test_images_that_do_not_fit_in_memory_are_streamed(
    config: SeedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, colour in (("cat", 50), ("dog", 200)):
        put_class(tmp_path / "images" / name, 20, colour)
    config = replace(config, recipe="cifar10-lenet5", dataset=f"folder:{tmp_path}/images", image_size=32, runs=2)
    study_seeds(config)
    monkeypatch.setattr("trainer.prepare.device_memory", lambda device: 1000)
    other = tmp_path / "runs" / "streamed"
    study_seeds(replace(config, run_dir=other))
    folders = [RunFolder.read(folder / "seed-1") for folder in (tmp_path / "runs" / "study", other)]
    assert [folder.fingerprint.source for folder in folders] == ["resident", "streamed"]
    results = [folder.result() for folder in folders]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].weights_sha256 == results[1].weights_sha256


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


def test_seeds_side_by_side_have_the_weights_of_seeds_one_after_another(
    config: SeedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.studies.branches.SAVE_EVERY_S", 0.0)
    alone, together = tmp_path / "runs/study", tmp_path / "other/study"
    few = replace(config, runs=2, set=("global_batch_size=500",), network="lecture")
    study_seeds(few)
    study_seeds(replace(few, stack=2, run_dir=together))
    found = [[read(folder / f"seed-{seed}/result.json") for seed in range(2)] for folder in (alone, together)]
    assert [result["weights_sha256"] for result in found[0]] == [result["weights_sha256"] for result in found[1]]
    assert [[result["stacked"] for result in results] for results in found] == [[1, 1], [2, 2]]
    assert {(result["model"], result["global_batch_size"]) for result in found[1]} == {("lecture", 500)}
    assert not list(together.glob("side-by-side-*")), "the checkpoints of all go when each has its own"
    (together / "seed-1/result.json").unlink()  # as if the study had been stopped before this evaluation
    study_seeds(replace(few, stack=2, run_dir=together))
    assert read(together / "seed-1/result.json")["weights_sha256"] == found[0][1]["weights_sha256"]


def test_options_out_of_range_are_refused(config: SeedsConfig) -> None:
    with pytest.raises(ConfigError, match="--runs must be at least 1"):
        study_seeds(replace(config, runs=0))
    with pytest.raises(ConfigError, match="no field 'lr'"):
        study_seeds(replace(config, set=("lr=1",)))


def some_seeds(num: int, *, stacked: int = 1) -> SeedResults:
    results = [make_result(seed=seed, test_errors=90 + seed, num_test=10_000, stacked=stacked) for seed in range(num)]
    return SeedResults(results=results, diverged=[], others=[], num_evaluations=num)


def test_the_page_states_what_seeds_side_by_side_are() -> None:
    text = " ".join(make_page(RECIPES["mnist"], some_seeds(2, stacked=2)).findings)
    assert "Up to 2 seeds were trained side by side, each by its own step, to the weights that it gets alone." in text


def test_figures_with_views_and_warnings_are_findings() -> None:
    seeds = some_seeds(3)
    results = [replace(result, test_errors_with_views=result.test_errors - 20) for result in seeds.results[1:]]
    results = [seeds.results[0], replace(results[0], warnings=("it predicts one class",)), results[1]]
    text = " ".join(make_page(RECIPES["mnist-fast"], replace(seeds, results=results)).findings)
    assert "With 5 views of each image instead of one: Test error: worst 0.72 %, median 0.71 %, best 0.71 %" in text
    assert "Version 0.1 evaluated 1 of these runs, with 5 views alone" in text
    assert "Seed 1, warning: it predicts one class." in text
    assert "views" not in " ".join(make_page(RECIPES["mnist"], seeds).findings)


def test_the_lectures_figures_are_shown_for_its_own_recipe_only() -> None:
    page = make_page(RECIPES["mnist"], some_seeds(10))
    other = make_page(RECIPES["mnist-fast"], some_seeds(10))
    text = " ".join(page.findings)
    assert "worst 0.99 %, median 0.94 %, best 0.90 %" in page.findings[0].replace("0.95", "0.94")
    assert "The lecture's 100 runs: worst 1.3 %, median 1.0 %, best 0.82 %" in text
    assert "lecture" not in " ".join(other.findings).lower()
    assert "side by side" not in " ".join(other.findings)


@pytest.mark.parametrize("num_runs", [20, 56, 150])
def test_each_bin_holds_as_many_of_the_possible_errors(num_runs: int) -> None:
    seeds = some_seeds(num_runs)  # one for each number of wrong images
    (histogram,) = make_page(RECIPES["mnist-fast"], seeds).figures
    with style():
        (axes,) = histogram.draw(narrow=False).axes
    counts = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert sum(counts) == num_runs
    assert len(set(counts[1:-2])) == 1


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("shift", [-6, 0, 12])  # our median at the lecture's best, as measured, and at its median
def test_labels_overlap_neither_each_other_nor_the_lines(shift: int, narrow: bool) -> None:
    table = (ROOT / "benchmarks/results/seeds-mnist-2026-11-27.csv").read_text().splitlines()
    percents = [float(row["test error, %"]) for row in csv.DictReader(table)]
    seeds = some_seeds(len(percents))
    results = [
        replace(result, test_errors=round(100 * percent) + shift)
        for result, percent in zip(seeds.results, percents, strict=True)
    ]
    (histogram,) = make_page(RECIPES["mnist"], replace(seeds, results=results)).figures
    with style():
        figure = histogram.draw(narrow=narrow)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [label.get_window_extent() for label in axes.texts]
    assert len(labels) == 4
    others = labels + [line.get_window_extent() for line in axes.lines]
    for number, label in enumerate(labels):
        assert not any(label.overlaps(other) for other in others[number + 1 :])
