"""Trainings on all training images (num_validation 0): no validation accuracy is shown, and nothing is chosen by it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.loop.runs import make_run
from trainer.config import EvaluateConfig, ExportConfig, TrainConfig
from trainer.data import Dataset
from trainer.errors import ConfigError, ExportError
from trainer.export.quality import Correctness, decide
from trainer.export.repository import RepositoryModel
from trainer.loop.run import Run
from trainer.recipes import RECIPES
from trainer.records.metrics import read_metrics
from trainer.reopen import evaluate_run, export_run
from trainer.studies.sweep import SweepConfig, study_sweep
from trainer.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> tuple[TrainConfig, list[str]]:
    """A run on all training images that published its model, and what it printed."""
    folder = tmp_path_factory.mktemp("all")
    config = TrainConfig(
        dataset="mnist-mini",
        epochs=1,
        num_validation=0,
        run_dir=folder / "runs/all",
        model_repository=folder / "models",
        data_dir=data_dir,
        device="cpu",
    )
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.progress.Progress.log", lambda _, line: lines.append(line))
        train(config)
    return config, lines


def test_all_images_are_trained_on_and_no_validation_accuracy_is_shown(
    finished: tuple[TrainConfig, list[str]],
) -> None:
    config, lines = finished
    assert config.run_dir is not None
    result = json.loads((config.run_dir / "result.json").read_text())
    assert (result["num_validation"], result["val_accuracy"], result["steps"]) == (0, None, 50)
    assert "val_accuracy_with_views" not in result
    assert result["test_accuracy"] > 0.6
    assert any("5,000 training, no validation and 1,000 test images" in line for line in lines)
    assert sum("no validation;" in line for line in lines if line.startswith("epoch ")) == 1
    assert not any("validation accuracy" in line for line in lines)
    epochs = [line for line in read_metrics(config.run_dir) if line["kind"] == "epoch"]
    assert [sorted(key for key in line if key.startswith("val_")) for line in epochs] == [[]]
    page = (config.run_dir / "report.html").read_text()
    assert "All training images were trained on" in page
    assert "Validation accuracy" not in page
    assert (config.run_dir / "tensorboard/train").is_dir()
    assert not (config.run_dir / "tensorboard/validation").exists()


def test_its_manifest_has_no_validation_figures_and_a_later_version_needs_promote(
    finished: tuple[TrainConfig, list[str]], tmp_path: Path
) -> None:
    config, _ = finished
    manifest = json.loads((config.model_repository / "mnist/1/manifest.json").read_text())
    assert (manifest["metrics"]["num_val"], manifest["metrics"]["val_accuracy"]) == (0, None)
    assert manifest["quality"]["objection"] is None
    with pytest.raises(ConfigError, match=r"nothing tells if the model is worse than version 1 .* --promote"):
        train(replace(config, run_dir=tmp_path / "runs/again"))
    assert not (tmp_path / "runs/again").exists()


def test_it_cannot_be_evaluated_on_validation_images_nor_published_in_int8(
    finished: tuple[TrainConfig, list[str]],
) -> None:
    config, _ = finished
    assert config.run_dir is not None
    known = {"data_dir": config.data_dir, "device": "cpu"}
    with pytest.raises(ConfigError, match="has no validation images: give --split test"):
        evaluate_run(EvaluateConfig(run=config.run_dir, **known))  # type: ignore[arg-type]
    assert len((config.run_dir.parent / "ledger.jsonl").read_text().splitlines()) == 1
    with pytest.raises(ExportError, match="export it without --int8"):
        export_run(ExportConfig(run=config.run_dir, int8=True, model_repository=config.model_repository, **known))  # type: ignore[arg-type]


def test_a_later_version_with_validation_images_is_published_beside_it(tmp_path: Path) -> None:
    model = RepositoryModel(repository=tmp_path, name="m", image_shape=(1, 8, 8), labels=("a", "b"))
    nothing = Correctness.of(np.zeros(0, dtype=bool), "", 0)
    assert decide(model, nothing, None).objection is None
    assert "learned nothing" in str(decide(model, nothing, "a").objection)
    manifest = json.dumps({"labels": ["a", "b"], "metrics": nothing.metrics, "validation": nothing.to_json()})
    model.publish({"model.onnx": b""}, lambda _: manifest.encode())
    assert "worse than version 1" in str(decide(model, nothing, None).objection)
    with_images = decide(model, Correctness.of(np.ones(100, dtype=bool), "", 100), None)
    assert with_images.objection is None
    assert "cannot be compared" in with_images.line


@pytest.mark.parametrize("field", ["patience=2", "keep_best=true"])
def test_fields_that_choose_by_validation_images_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="by validation images, and num_validation 0 sets none aside"):
        TrainConfig(num_validation=0, set=(field,)).resolve()


def test_a_sweep_needs_validation_images(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "all-images", replace(RECIPES["mnist"], name="all-images", num_validation=0))
    with pytest.raises(ConfigError, match="a sweep ranks its candidates by validation images"):
        study_sweep(SweepConfig(recipe="all-images", data_dir=data_dir, run_dir=tmp_path / "study", device="cpu"))


def test_a_folder_of_validation_images_is_not_trained_on(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPES["mnist"], num_validation=0)
    run: Run = make_run(recipe, mini, tmp_path / "run")
    assert (len(run.train_indices), run.has_validation) == (5000, False)
    with pytest.raises(ConfigError, match="move them to the training images"):
        make_run(recipe, replace(mini, validation=mini.train), tmp_path / "other")
