"""Tests of the regression study: closed form and SGD agree."""

import json
from pathlib import Path

import pytest
import torch

from trainer.errors import ConfigError
from trainer.studies.regression import (
    TRUE_LINE,
    RegressionConfig,
    fit_by_sgd,
    fit_closed_form,
    make_people,
    study_regression,
)


def test_without_noise_both_find_the_true_line() -> None:
    ages, pressures = make_people(50, 0.0, 0)
    for line in (fit_closed_form(ages, pressures), fit_by_sgd(ages, pressures, epochs=60, seed=0)[-1]):
        assert line.slope == pytest.approx(TRUE_LINE.slope, abs=1e-3)
        assert line.intercept == pytest.approx(TRUE_LINE.intercept, abs=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_noise_both_find_the_same_line(seed: int) -> None:
    ages, pressures = make_people(60, 14.0, seed)
    closed, sgd = fit_closed_form(ages, pressures), fit_by_sgd(ages, pressures, epochs=200, seed=seed)[-1]
    for age in (10, 80):
        assert sgd.slope * age + sgd.intercept == pytest.approx(closed.slope * age + closed.intercept, abs=0.2)


def test_the_closed_form_minimises_the_error() -> None:
    ages, pressures = make_people(40, 10.0, 3)
    line = fit_closed_form(ages, pressures)

    def error(slope: float, intercept: float) -> float:
        return float((slope * ages + intercept - pressures).square().sum())

    least = error(line.slope, line.intercept)
    for change in (-1e-3, 1e-3):
        assert least < error(line.slope + change, line.intercept)
        assert least < error(line.slope, line.intercept + change)
    assert ages.dtype == torch.float64


def test_the_study_writes_a_page_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    config = RegressionConfig(num_people=20, epochs=20, run_dir=folder)
    study_regression(config)
    study_regression(config)  # the same study continues in its folder
    printed = capsys.readouterr().out
    assert printed.startswith("Least squares finds ")
    assert f"report: {folder / 'report.html'}" in printed
    for name in ("line", "sgd"):
        assert (folder / f"figures/{name}.svg").read_text().lstrip().startswith("<?xml")
        assert (folder / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "lines.csv").read_text().startswith("line,")
    assert (folder / "lines.md").read_text().count("\n") == 5
    result = json.loads((folder / "result.json").read_text())
    assert result["study"] == "regression"
    assert result["machine"]["cpus"] >= 1
    html = (folder / "report.html").read_text()
    assert "generated" in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "").replace("data:image/svg+xml", "").split("<section>")[0]


def test_the_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    study_regression(RegressionConfig(num_people=20, epochs=2, run_dir=tmp_path / "study"))
    with pytest.raises(ConfigError, match="with other options, --num-people 20 "):
        study_regression(RegressionConfig(num_people=21, epochs=2, run_dir=tmp_path / "study"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="not empty and holds no study"):
        study_regression(RegressionConfig(run_dir=tmp_path / "full"))
    with pytest.raises(ConfigError, match="at least 3"):
        study_regression(RegressionConfig(num_people=2, run_dir=tmp_path / "other"))
