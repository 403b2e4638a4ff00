"""Tests of the sweep: its ranking, candidates that diverge, and that it uses no test image."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.folder.image_files import put_class
from trainer.cli import parse
from trainer.config import TrainConfig
from trainer.config_file import CommandLine
from trainer.errors import ConfigError, DataError, DivergenceError
from trainer.recipes import RECIPES
from trainer.report.figures import style, to_svg
from trainer.studies.search_space import Candidate, apply_candidate
from trainer.studies.sweep import SweepConfig, study_sweep, training_command
from trainer.studies.sweep_page import make_page


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
    path = folder / "candidate-1-s0" / "config.json"
    path.write_text(path.read_text().replace('"epochs": 1,', '"epochs": 9,'))
    with pytest.raises(ConfigError, match=r"candidate-1-s0 is of another run: its recipe\.epochs is 9"):
        study_sweep(config)


def test_the_command_trains_the_candidates_recipe() -> None:
    own = {
        "recipe": "mnist-fast",
        "dataset": "mnist-mini",
        "epochs": 3,
        "network": "lenet5",
        "set": ("ema_decay=0.9",),
    }
    config = SweepConfig(**own)  # type: ignore[arg-type]
    candidate: Candidate = {"lr_scale": 0.5, "augment.shift": 1, "param_groups.stem.lr": 0.1, "global_batch_size": 50}
    candidate |= {"epochs": 2, "network": "lecture"}
    command = shlex.split(training_command(config, candidate))
    assert command[:2] == ["convoy", "train"]
    line = CommandLine.read(command[2:])
    trained = line.combine(parse(TrainConfig, line.arguments, prog="convoy train", default=line.default)).resolve()
    base = TrainConfig(**own | {"set": ()}).resolve()  # type: ignore[arg-type]
    assert trained == apply_candidate(base, candidate, config.set)


def test_candidates_rank_by_accuracy_then_by_loss_and_those_that_diverged_are_last() -> None:
    def trained(number: int, accuracy: float | None, loss: float | None) -> dict[str, Any]:
        is_diverged = accuracy is None
        figures = {"val_accuracy": accuracy, "val_loss": loss, "diverged": is_diverged, "train_seconds": 1.0}
        return {"number": number, "seed": 0, **figures}

    def ranked(*results: tuple[float | None, float | None]) -> tuple[list[str], str]:
        candidates: list[Candidate] = [{"lr_scale": number} for number in range(len(results))]
        found = [trained(number, *result) for number, result in enumerate(results)]
        page = make_page(RECIPES["mnist"], candidates, found, str)
        return [str(row[1]) for row in page.tables[0].rows], page.findings[0]

    order, finding = ranked((None, None), (0.5, 1.0), (0.75, 2.0), (0.75, 1.9))
    assert order == ["3", "2", "1", "0"]
    assert finding == "Best on validation images: lr_scale 3, accuracy 75.00 %."
    order, finding = ranked((None, None), (0.0, 9.0))
    assert order == ["1", "0"]
    assert finding == "Best on validation images: lr_scale 1, accuracy 0.00 %."


def test_long_names_leave_room_for_the_points() -> None:
    values = {f"param_groups.{kind}.weight_decay": 0.001 for kind in ("stem", "filters", "matrices", "vectors")}
    candidates: list[Candidate] = [{"lr_scale": scale} | values for scale in (0.5, 1)]
    figures = {"val_accuracy": 0.5, "val_loss": 1.0, "diverged": False, "train_seconds": 1.0}
    results = [{"number": number, "seed": 0, **figures} for number in range(2)]
    (figure,) = make_page(RECIPES["mnist"], candidates, results, str).figures
    assert figure.caption.endswith("The table has the values of each rank.")
    for narrow in (False, True):
        with style():
            drawn = figure.draw(narrow=narrow)
            to_svg(drawn)  # lays it out
        assert drawn.axes[0].get_position().width > 0.6


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
    # What cannot be trained is refused before the first candidate is.
    with pytest.raises(ConfigError, match="images of 28 pixels cannot be shifted by 28"):
        study_sweep(replace(config, grid=("augment.shift=1,28",), run_dir=tmp_path / "other"))
    with pytest.raises(ConfigError, match="nowhere"):
        study_sweep(replace(config, grid=("freeze_until=none,nowhere",), run_dir=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
