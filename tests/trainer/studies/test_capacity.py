"""Tests of the capacity study: errors fall on training data and rise again on new data."""

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
    study_capacity,
    train_network,
    true_function,
    vandermonde,
)
from trainer.studies.capacity_page import NetworkErrors, make_page


def test_the_vandermonde_matrix_holds_the_vandermonde() -> None:
    assert vandermonde(torch.tensor([2.0, 3.0]), 3).tolist() == [[1, 2, 4, 8], [1, 3, 9, 27]]
    assert vandermonde(torch.tensor([2.0, 3.0]), 0).tolist() == [[1], [1]]


def test_the_coefficients_of_a_polynomial_are_recovered() -> None:
    x = torch.linspace(0, 1, 12, dtype=torch.float64)
    wanted = torch.tensor([0.5, -2.0, 3.0, 1.0], dtype=torch.float64)
    assert torch.allclose(fit_polynomial(x, vandermonde(x, 3) @ wanted, 3), wanted, atol=1e-8)


def test_errors_fall_on_the_points_and_rise_again_on_new_ones() -> None:
    found = fit_polynomials(14, 0.15, 40, 0)
    train, test = found.train.median(dim=0).values, found.test.median(dim=0).values
    assert all(train[degree] >= train[degree + 1] - 1e-6 for degree in range(MAX_DEGREE))
    best = int(test.argmin())
    assert 2 <= best <= 7
    assert test[0] > 2 * test[best]
    assert test[MAX_DEGREE] > 2 * test[best]
    assert test.min() > 0.15**2 * 0.9  # the noise is irreducible
    values = true_function(torch.linspace(0, 1, 100, dtype=torch.float64))
    assert -0.5 < values.min() < values.max() < 1.5


def test_the_median_of_an_even_number_lies_in_the_middle() -> None:
    found = fit_polynomials(14, 0.15, 2, 0)
    errors = NetworkErrors(widths=(1,), train=torch.zeros(1, 1), test=torch.zeros(1, 1))
    result = make_page(found, errors, 0.1).result
    assert result["test_mse"] == pytest.approx(found.test.mean(dim=0).tolist())


def test_a_wider_network_memorises_more() -> None:
    stream = torch.Generator().manual_seed(0)
    noise = ImageSet(torch.randn(60, 20, generator=stream), torch.randint(10, (60,), generator=stream))
    narrow, _ = train_network(noise, noise, width=1, epochs=60, seed=0)
    wide, _ = train_network(noise, noise, width=64, epochs=60, seed=0)
    assert wide < 0.05 < 0.3 < narrow


TINY = CapacityConfig(repeats=3, widths=(1, 4), num_images=100, network_repeats=2, epochs=1)


def test_the_study_continues_after_an_interruption(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(TINY, data_dir=data_dir, run_dir=tmp_path / "study")
    study_capacity(config)
    printed = capsys.readouterr().out
    assert printed.startswith("4 networks with ")
    assert printed.count("training error") == 4
    for name in ("polynomials", "errors-by-degree", "errors-by-width"):
        assert (tmp_path / f"study/figures/{name}.png").exists()
    whole = (tmp_path / "study/result.json").read_bytes()
    lines = (tmp_path / "study/results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "study/results.jsonl").write_text("".join(lines[:2]) + lines[2][:10])  # killed while writing
    study_capacity(config)
    assert capsys.readouterr().out.count("training error") == 2
    assert (tmp_path / "study/result.json").read_bytes() == whole


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
def test_options_out_of_range_are_refused(change: dict[str, object], tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(ConfigError):
        study_capacity(replace(TINY, data_dir=data_dir, run_dir=tmp_path / "study", **change))  # type: ignore[arg-type]
