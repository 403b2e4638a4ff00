"""Tests of the zoo study: published accuracies, counted costs, and times that are measured once."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.records.results import make_result
from trainer.errors import ConfigError
from trainer.recipes import RECIPES
from trainer.studies import zoo
from trainer.studies.zoo import ZooConfig, study_zoo


@pytest.fixture
def config(tmp_path: Path) -> ZooConfig:
    return ZooConfig(
        originals=(),
        small=("lenet5",),
        batch_sizes=(1, 3),
        seconds=0.01,
        runs=tmp_path / "runs",
        run_dir=tmp_path / "runs" / "study",
    )


@pytest.mark.slow
def test_the_study_measures_each_runtime_once(
    config: ZooConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in ("_original_entry", "_small_cost"):  # seconds each: once for both studies
        monkeypatch.setattr(zoo, count, functools.cache(getattr(zoo, count)))
    for seed, accuracy in enumerate((0.6, 0.7, 0.62)):
        folder = tmp_path / "runs" / (f"r{seed}" if seed < 2 else "study-seeds/seed-2")
        folder.mkdir(parents=True)
        finished = make_result(
            dataset="cifar10",
            recipe="cifar10-lenet5",
            model="lenet5",
            test_accuracy=accuracy,
            epochs=30 if seed else 5,
        )
        finished.write(folder / "result.json")
    averaged = make_result(dataset="cifar10", recipe="cifar10-small", model="airbench", epochs=8)  # of version 0.1
    (tmp_path / "runs/old").mkdir()
    averaged.write(tmp_path / "runs/old/result.json")
    whole_study = {"study": "seeds", "dataset": "cifar10", "recipe": "cifar10-small"}
    (tmp_path / "runs/study-seeds/result.json").write_text(json.dumps(whole_study))
    study_zoo(config)
    folder = tmp_path / "runs" / "study"
    assert f"minutes or more; results in {folder}\n" in capsys.readouterr().out.splitlines(keepends=True)[0]
    result = json.loads((folder / "result.json").read_text())
    assert result["imagenet"]["resnet50"]["accuracy"] == pytest.approx(0.76130)
    assert result["imagenet"]["vgg16"]["num_parameters"] == 138_357_544
    assert result["small"]["lenet5"] == {
        "accuracy": 0.62,  # the median of all runs, not the best
        "num_runs": 3,
        "epochs": "5, fewer epochs than the recipe's 30; 30",
        "num_parameters": 62_006,
        "multiply_adds": 651_720,
    }
    assert result["small"]["cifar10-small"]["epochs"] == "8, 6 views averaged"
    times = result["milliseconds_an_image"]
    wanted = {f"small lenet5 {kind} {batch}" for kind in ("eager", "torchscript", "onnxruntime") for batch in (1, 3)}
    assert set(times) == wanted
    assert all(value > 0 for value in times.values())
    for name in ("accuracy-by-cost", "small-accuracy-by-cost", "small-times"):
        assert "$" not in (folder / f"figures/{name}.svg").read_text()  # no formula as a label
    capsys.readouterr()
    study_zoo(config)
    assert "per pass" not in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["milliseconds_an_image"] == times


def test_every_family_with_a_recipe_is_in_the_zoo() -> None:
    ours = {"airbench", "airbench-residual"}
    families = {recipe.network for recipe in RECIPES.values() if recipe.name.startswith("cifar10-")} - ours
    assert families < set(ZooConfig().small)


def test_unknown_networks_and_falling_batch_sizes_are_refused(config: ZooConfig) -> None:
    with pytest.raises(ConfigError, match="resnet19"):
        study_zoo(replace(config, originals=("resnet19",)))
    with pytest.raises(ConfigError, match="rising"):
        study_zoo(replace(config, batch_sizes=(4, 1)))
