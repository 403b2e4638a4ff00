"""Tests of the statistics over seeds, against published tables and simulations."""

import numpy as np
import pytest

from trainer.studies.summary import interval_of_median, required_runs, student_quantile, summarize_errors


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
    assert summary.median_interval is None
    assert summarize_errors([0.1, 0.9]).mean_interval == (0.0, pytest.approx(0.5 + 12.706 * 0.4, rel=3e-3))
    assert summarize_errors([1.0, 1.2, 0.8, 1.1, 0.9, 1.4]).median_interval == (0.8, 1.4)


def test_a_single_run_has_no_standard_deviation_and_no_intervals() -> None:
    summary = summarize_errors([1.0])
    assert summary.worst == summary.best == summary.median == 1.0
    assert summary.std is summary.mean_interval is summary.median_interval is None


@pytest.mark.parametrize(("num_runs", "rank"), [(6, 1), (9, 2), (30, 10), (100, 40)])
def test_the_interval_of_the_median_has_the_published_ranks(num_runs: int, rank: int) -> None:
    # Table of the sign test's critical values, two-sided 5 %: 0, 1, 9 and 39 values may lie outside on each side.
    values = np.random.default_rng(1).permutation(np.arange(1.0, num_runs + 1))
    assert interval_of_median(values) == (rank, num_runs + 1 - rank)


def test_fewer_than_six_runs_have_no_interval_of_the_median() -> None:
    for num_runs in range(2, 6):  # the extremes of five enclose it in 15 of 16 cases
        assert interval_of_median(np.arange(float(num_runs))) is None


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
