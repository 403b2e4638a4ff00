"""A few numbers for many seeds, checked against what is known of them."""

import numpy as np
import pytest

from trainer.studies.summary import bootstrap_median, runs_to_tell_apart, student_quantile, summarize


@pytest.mark.parametrize(
    ("degrees_of_freedom", "published"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (29, 2.045)]
)
def test_students_quantiles_are_those_of_the_tables(degrees_of_freedom: int, published: float) -> None:
    assert student_quantile(degrees_of_freedom) == pytest.approx(published, rel=3e-3)


def test_summary_of_known_numbers() -> None:
    summary = summarize([1.0, 1.2, 0.8, 1.1, 0.9])
    assert (summary.num_runs, summary.worst, summary.median, summary.best) == (5, 1.2, 1.0, 0.8)
    assert summary.mean == pytest.approx(1.0)
    assert summary.deviation == pytest.approx(0.025**0.5)
    assert summary.mean_interval == pytest.approx((0.8037, 1.1963), abs=2e-3)
    assert summary.median_interval is not None
    assert 0.8 <= summary.median_interval[0] < 1.0 < summary.median_interval[1] <= 1.2
    assert summarize([1.0, 1.2, 0.8, 1.1, 0.9]) == summary


def test_a_single_run_has_no_spread() -> None:
    summary = summarize([1.0])
    assert summary.worst == summary.best == summary.median == 1.0
    assert summary.deviation is summary.mean_interval is summary.median_interval is None


def test_the_bootstrap_interval_covers_the_median_about_as_often_as_it_says() -> None:
    stream = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_median(stream.normal(size=30))
        covered += low <= 0 <= high
    assert 85 <= covered <= 100


def test_runs_needed_follow_the_square_of_the_difference() -> None:
    assert runs_to_tell_apart(0.1, 0.1) == 16  # 2 * (1.96 + 0.84)^2 = 15.7
    assert runs_to_tell_apart(0.05, 0.1) == 63
    assert runs_to_tell_apart(10.0, 0.1) == 2
