"""Polynomials and networks: errors fall on what is fitted, and turn up again on what is new."""

import html
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.data import ImageSet
from trainer.errors import ConfigError
from trainer.studies.capacity import (
    MAX_DEGREE,
    CapacityConfig,
    fit_polynomial,
    fit_polynomials,
    powers,
    study_capacity,
    train_network,
    true_curve,
)


def test_the_matrix_is_vandermondes() -> None:
    assert powers(torch.tensor([2.0, 3.0]), 3).tolist() == [[1, 2, 4, 8], [1, 3, 9, 27]]
    assert powers(torch.tensor([2.0, 3.0]), 0).tolist() == [[1], [1]]


def test_a_polynomials_own_coefficients_are_found() -> None:
    x = torch.linspace(0, 1, 12, dtype=torch.float64)
    wanted = torch.tensor([0.5, -2.0, 3.0, 1.0], dtype=torch.float64)
    assert torch.allclose(fit_polynomial(x, powers(x, 3) @ wanted, 3), wanted, atol=1e-8)


def test_errors_fall_on_the_points_and_turn_on_new_ones() -> None:
    found = fit_polynomials(14, 0.15, 40, 0)
    train, test = found.train.median(dim=0).values, found.test.median(dim=0).values
    assert all(train[degree] >= train[degree + 1] - 1e-6 for degree in range(MAX_DEGREE))
    best = int(test.argmin())
    assert 2 <= best <= 7
    assert test[0] > 2 * test[best]
    assert test[MAX_DEGREE] > 2 * test[best]
    assert test.min() > 0.15**2 * 0.9  # nothing is better than the noise
    values = true_curve(torch.linspace(0, 1, 100, dtype=torch.float64))
    assert -0.5 < values.min() < values.max() < 1.5


def test_a_wider_network_learns_more_by_heart() -> None:
    stream = torch.Generator().manual_seed(0)
    noise = ImageSet(torch.randn(60, 20, generator=stream), torch.randint(10, (60,), generator=stream))
    narrow, _ = train_network(noise, noise, width=1, epochs=60, seed=0)
    wide, _ = train_network(noise, noise, width=64, epochs=60, seed=0)
    assert wide < 0.05 < 0.3 < narrow


TINY = CapacityConfig(repeats=3, widths=(1, 4), num_images=100, network_repeats=2, epochs=1)


def test_the_study_goes_on_where_it_was_interrupted(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(TINY, data_dir=data_dir, run_dir=tmp_path / "study")
    study_capacity(config)
    said = capsys.readouterr().out
    assert said.count("wrong on") == 4
    for name in ("polynomials", "errors-by-degree", "errors-by-width"):
        assert (tmp_path / f"study/figures/{name}.png").exists()
    whole = (tmp_path / "study/result.json").read_bytes()
    lines = (tmp_path / "study/results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "study/results.jsonl").write_text("".join(lines[:2]) + lines[2][:10])  # killed while it wrote
    study_capacity(config)
    assert capsys.readouterr().out.count("wrong on") == 2
    assert (tmp_path / "study/result.json").read_bytes() == whole


def test_a_study_that_goes_on_elsewhere_names_both_machines(tmp_path: Path, data_dir: Path) -> None:
    config = replace(TINY, widths=(1,), network_repeats=1, data_dir=data_dir, run_dir=tmp_path / "study")
    study_capacity(config)
    assert "continued_on" not in json.loads((tmp_path / "study/result.json").read_text())
    mark = json.loads((tmp_path / "study/study.json").read_text())
    mark["machine"]["device"] = "an abacus"
    (tmp_path / "study/study.json").write_text(json.dumps(mark))
    for _ in range(2):  # the second time, this machine is known
        study_capacity(config)
    result = json.loads((tmp_path / "study/result.json").read_text())
    assert result["machine"]["device"] == "an abacus"
    (here,) = result["continued_on"]
    page = " ".join((tmp_path / "study/report.html").read_text().split())
    assert "On an abacus" in page
    assert f"; continued on {html.escape(here['device'])}" in page


def test_other_threads_are_no_other_machine(tmp_path: Path, data_dir: Path) -> None:
    """A rank's share of them follows from how many ranks there are."""
    config = replace(TINY, widths=(1,), network_repeats=1, data_dir=data_dir, run_dir=tmp_path / "study")
    study_capacity(config)
    mark = json.loads((tmp_path / "study/study.json").read_text())
    mark["machine"]["threads"] += 1
    (tmp_path / "study/study.json").write_text(json.dumps(mark))
    study_capacity(config)
    assert "continued_on" not in json.loads((tmp_path / "study/result.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"num_points": 1},
        {"label_noise": 1.5},
        {"noise": float("nan")},
        {"widths": ()},
        {"widths": (0,)},
        {"num_images": 10_000},
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, object], tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(ConfigError):
        study_capacity(replace(TINY, data_dir=data_dir, run_dir=tmp_path / "study", **change))  # type: ignore[arg-type]
