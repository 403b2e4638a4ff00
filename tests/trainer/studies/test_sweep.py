"""Tests of the sweep: its ranking, candidates that diverge, and that it uses no test image."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.data.folder.image_files import put_class
from trainer.cli import parse
from trainer.config import TrainConfig
from trainer.config_file import CommandLine
from trainer.errors import ConfigError, DataError, DivergenceError
from trainer.studies.search_space import apply_candidate
from trainer.studies.sweep import SweepConfig, study_sweep, training_command


def test_the_best_on_validation_is_named_and_no_test_image_used(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "study"
    config = SweepConfig(
        recipe="mnist-lenet5",
        dataset="mnist-mini",
        epochs=1,
        grid=("lr_scale=0.0001,1,1e9",),
        data_dir=data_dir,
        run_dir=folder,
        device="cpu",
    )
    study_sweep(config)
    result = json.loads((folder / "result.json").read_text())
    assert result["best"] == {"lr_scale": 1}
    assert result["command"] == (
        f"convoy train --recipe mnist-lenet5 --dataset mnist-mini --epochs 1 --data-dir {data_dir}"
    )
    printed = capsys.readouterr().out
    assert printed.startswith("3 trainings of 1 epoch each: mnist-lenet5 on mnist-mini, lr_scale=0.0001,1,1e9, ranked")
    assert "lr_scale 0.0001, seed 0: validation accuracy" in printed
    assert "; 1 of 3, " in printed
    assert f"to train with the best values: {result['command']}\n" in printed
    assert result["candidates"][2]["diverged"]  # ranked last; the study continues
    assert result["candidates"][2]["val_accuracy"] is result["candidates"][2]["val_loss"] is None
    page = (folder / "report.html").read_text()
    assert "1 of 3 candidates diverged" in page
    assert "<td>diverged</td>" in re.sub(r"<td[^>]*>", "<td>", page)
    assert not (tmp_path / "runs/ledger.jsonl").exists()
    assert "test_accuracy" not in (folder / "result.json").read_text()
    study_sweep(config)
    printed = capsys.readouterr().out
    assert "3 of 3 trainings are done already" in printed
    assert "validation accuracy" not in printed  # no candidate is trained again


def test_the_command_trains_the_candidates_recipe() -> None:
    own = {
        "recipe": "mnist-fast",
        "dataset": "mnist-mini",
        "epochs": 3,
        "network": "lecture",
        "set": ("ema_decay=0.9",),
    }
    config = SweepConfig(**own)  # type: ignore[arg-type]
    candidate = {"lr_scale": 0.5, "augment.shift": 1, "param_groups.stem.lr": 0.1, "global_batch_size": 50, "epochs": 2}
    command = shlex.split(training_command(config, candidate))
    assert command[:2] == ["convoy", "train"]
    line = CommandLine.read(command[2:])
    trained = line.combine(parse(TrainConfig, line.arguments, prog="convoy train", default=line.default)).resolve()
    base = TrainConfig(**own | {"set": ()}).resolve()  # type: ignore[arg-type]
    assert trained == apply_candidate(base, candidate, config.set)


def test_the_plan_is_printed_before_a_data_set_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"folder:{tmp_path / 'missing'}"
    config = SweepConfig(dataset=missing, grid=("epochs=2,4,6", "augment.shift=0,1"), random=5, seeds=2, device="cpu")
    with pytest.raises(ConfigError, match="missing"):
        study_sweep(config)
    assert capsys.readouterr().out == (
        f"10 trainings of 2 to 6 epochs each: mnist on {missing}, epochs=2,4,6 augment.shift=0,1, from 2 seeds each, "
        "ranked by validation images; --grid asks for other values\n"
    )


def test_bad_files_of_a_folder_are_left_out_as_in_a_training(tmp_path: Path) -> None:
    for name, level in (("cat", 50), ("dog", 200)):
        put_class(tmp_path / "images" / name, 10, level)
    (tmp_path / "images" / "cat" / "note.png").write_text("no image")
    config = SweepConfig(
        recipe="mnist-lenet5",
        dataset=f"folder:{tmp_path / 'images'}",
        image_size=28,
        epochs=1,
        grid=("lr_scale=1",),
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "runs" / "study",
        device="cpu",
    )
    with pytest.raises(DataError, match="--skip-bad-images 1 leaves them out"):
        study_sweep(config)
    study_sweep(replace(config, skip_bad_images=1))
    result = json.loads((tmp_path / "runs" / "study" / "result.json").read_text())
    assert "--image-size 28 --skip-bad-images 1" in result["command"]


def test_candidates_that_all_diverge_are_an_error(tmp_path: Path, data_dir: Path) -> None:
    where = {"data_dir": data_dir, "run_dir": tmp_path / "study", "device": "cpu"}
    config = SweepConfig(recipe="mnist-lenet5", dataset="mnist-mini", epochs=1, grid=("lr_scale=1e8,1e9",), **where)  # type: ignore[arg-type]
    with pytest.raises(DivergenceError, match="all 2 candidates diverged"):
        study_sweep(config)
    with pytest.raises(ConfigError, match="images of 28 pixels cannot be shifted by 28"):
        study_sweep(replace(config, grid=("augment.shift=1,28",), run_dir=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
