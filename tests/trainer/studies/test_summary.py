"""Tests of the statistics over seeds, against published tables and simulations."""

import numpy as np
import pytest

from trainer.studies.summary import bootstrap_median, required_runs, student_quantile, summarize_errors


@pytest.mark.parametrize(
    ("degrees_of_freedom", "published"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (29, 2.045)]
)
def test_student_quantiles_match_published_tables(degrees_of_freedom: int, published: float) -> None:
    assert student_quantile(degrees_of_freedom) == pytest.approx(published, rel=3e-3)


@pytest.mark.parametrize(("degrees_of_freedom", "published"), [(2, 1.061), (4, 0.941), (10, 0.879), (30, 0.854)])
def test_student_quantiles_of_the_power_match_published_tables(degrees_of_freedom: int, published: float) -> None:
    assert student_quantile(degrees_of_freedom, 0.8) == pytest.approx(published, rel=3e-3)


def test_the_summary_of_known_errors() -> None:
    summary = summarize_errors([1.0, 1.2, 0.8, 1.1, 0.9])
    assert (summary.num_runs, summary.worst, summary.median, summary.best) == (5, 1.2, 1.0, 0.8)
    assert summary.mean == pytest.approx(1.0)
    assert summary.std == pytest.approx(0.025**0.5)
    assert summary.mean_interval == pytest.approx((0.8037, 1.1963), abs=2e-3)
    assert summary.median_interval is not None
    assert 0.8 <= summary.median_interval[0] < 1.0 < summary.median_interval[1] <= 1.2
    assert summarize_errors([1.0, 1.2, 0.8, 1.1, 0.9]) == summary


def test_a_single_run_has_no_standard_deviation_and_no_intervals() -> None:
    summary = summarize_errors([1.0])
    assert summary.worst == summary.best == summary.median == 1.0
    assert summary.std is summary.mean_interval is summary.median_interval is None


def test_the_bootstrap_interval_covers_the_median_at_about_its_level() -> None:
    stream = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_median(stream.normal(size=30))
        covered += low <= 0 <= high
    assert 85 <= covered <= 100


def test_required_runs_match_published_tables() -> None:
    assert required_runs(0.8, 1.0) == 26  # Cohen 1988, table 2.4.1
    assert required_runs(0.1, 0.1) == 17
    assert required_runs(0.05, 0.1) == 64
    assert required_runs(0.01, 0.1) == 1571
    assert required_runs(10.0, 0.1) == 2


@pytest.mark.parametrize("difference", [0.8, 1.2, 2.0, 3.0, 4.0])
def test_the_required_runs_detect_the_difference_in_8_of_10_comparisons(difference: float) -> None:
    stream, num_runs, num_comparisons = np.random.default_rng(0), required_runs(difference, 1.0), 20_000
    one, other = (stream.normal(mean, 1.0, size=(num_comparisons, num_runs)) for mean in (0.0, difference))
    standard_error = np.sqrt((one.var(axis=1, ddof=1) + other.var(axis=1, ddof=1)) / num_runs)
    found = np.abs(other.mean(axis=1) - one.mean(axis=1)) > student_quantile(2 * num_runs - 2) * standard_error
    assert found.mean() > 0.795
