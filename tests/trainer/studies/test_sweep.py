"""The search over a recipe's fields: what it tries, and that no test image is in its reach."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.errors import ConfigError, DivergenceError
from trainer.recipes import RECIPES
from trainer.studies.sweep import SweepConfig, change_recipe, make_candidates, study_sweep

MNIST = RECIPES["mnist"]


def test_a_grid_is_all_combinations_in_order() -> None:
    found = make_candidates(("lr_scale=0.5,1", "augment.shift=0,2", "augment.fill=zero"), 0)
    assert found == [
        {"lr_scale": 0.5, "augment.shift": 0, "augment.fill": "zero"},
        {"lr_scale": 0.5, "augment.shift": 2, "augment.fill": "zero"},
        {"lr_scale": 1, "augment.shift": 0, "augment.fill": "zero"},
        {"lr_scale": 1, "augment.shift": 2, "augment.fill": "zero"},
    ]


def test_random_candidates_are_some_of_them_and_always_the_same() -> None:
    grid = ("lr_scale=1,2,3,4,5", "global_batch_size=10,20,30,40")
    found = make_candidates(grid, 6)
    assert found == make_candidates(grid, 6)
    assert len({json.dumps(candidate) for candidate in found}) == 6
    assert all(candidate in make_candidates(grid, 0) for candidate in found)


def test_a_candidates_values_reach_the_recipe() -> None:
    values = {"lr_scale": 0.5, "augment.shift": 2, "label_smoothing": 0, "precision": "bfloat16"}
    changed = change_recipe(MNIST, values)
    assert {group.lr for group in changed.param_groups.values()} == {0.05}
    assert changed.augment.shift == 2
    assert changed.label_smoothing == 0.0
    assert changed.precision == "bfloat16"
    assert MNIST.augment.shift == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", 1),
        ("augment.shfit", 1),
        ("epochs.x", 1),
        ("dataset", "cifar10"),
        ("epochs", 0.5),
        ("lr_scale", -1),
        ("num_validation", 100),
        ("global_batch_size", 0),
        ("epochs", 0),
        ("augment.shift", -1),
        ("label_smoothing", 1.5),
        ("label_smoothing", float("nan")),
        ("precision", "float8"),
        ("augment.flip", "up"),
    ],
)
def test_fields_that_cannot_be_swept_are_refused(name: str, value: float | str) -> None:
    with pytest.raises(ConfigError):
        change_recipe(MNIST, {name: value})


@pytest.mark.parametrize("entry", ["lr_scale", "=1", "lr_scale=", "lr_scale=1,,2"])
def test_a_grid_that_cannot_be_read_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="write FIELD=VALUE"):
        make_candidates((entry,), 0)


def test_the_best_on_validation_is_named_and_no_test_image_seen(
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
    assert result["candidates"][2]["diverged"]  # last, and no end of the study
    assert result["candidates"][2]["val_accuracy"] is result["candidates"][2]["val_loss"] is None
    page = (folder / "report.html").read_text()
    assert "1 of 3 candidates diverged" in page
    assert "<td>diverged</td>" in re.sub(r"<td[^>]*>", "<td>", page)
    assert not (tmp_path / "runs/ledger.jsonl").exists()
    assert "test_accuracy" not in (folder / "result.json").read_text()
    capsys.readouterr()
    study_sweep(config)
    assert "validation accuracy" not in capsys.readouterr().out  # nothing is trained again


def test_candidates_that_all_diverge_have_no_best(tmp_path: Path, data_dir: Path) -> None:
    where = {"data_dir": data_dir, "run_dir": tmp_path / "study", "device": "cpu"}
    config = SweepConfig(recipe="mnist-lenet5", dataset="mnist-mini", epochs=1, grid=("lr_scale=1e8,1e9",), **where)  # type: ignore[arg-type]
    with pytest.raises(DivergenceError, match="all 2 candidates diverged"):
        study_sweep(config)
    with pytest.raises(ConfigError, match="images of 28 pixels cannot be shifted by 28"):
        study_sweep(replace(config, grid=("augment.shift=1,28",), run_dir=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
