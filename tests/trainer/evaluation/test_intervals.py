"""Wilson intervals, and the confidence levels that all evaluations on a test set share."""

import pytest

from trainer.evaluation.intervals import (
    confidence_level,
    describe_accuracy,
    simultaneous_interval,
    wilson_interval,
)


def test_wilson_interval_equals_published_values() -> None:
    low, high = wilson_interval(9900, 10000)
    assert (low, high) == (pytest.approx(0.98786, abs=2e-5), pytest.approx(0.99177, abs=2e-5))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0)


def test_the_intervals_of_all_evaluations_share_five_percent() -> None:
    shares = [1 - confidence_level(number) for number in range(1, 100_001)]
    assert sum(shares) == pytest.approx(0.05, abs=1e-6)
    assert sum(shares) < 0.05
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(0.030396, abs=1e-6)
    first = simultaneous_interval(9900, 10000, 1)
    assert first == pytest.approx(wilson_interval(9900, 10000, z=2.164887), abs=1e-6)
    tenth = simultaneous_interval(9900, 10000, 10)
    assert tenth == pytest.approx(wilson_interval(9900, 10000, z=3.611898), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "99.00 % (100 of 10,000 wrong; 95 % interval 98.79 to 99.18 %)"),
        ({"number": 10}, "99.00 % (100 of 10,000 wrong; interval 98.57 to 99.30 %, 95 % over all evaluations)"),
    ],
)
def test_an_accuracy_is_described_with_its_counts_and_interval(options: dict[str, int], text: str) -> None:
    assert describe_accuracy(100, 10_000, **options) == text


def test_the_accuracy_of_no_images_is_unknown() -> None:
    assert describe_accuracy(0, 0) == describe_accuracy(0, 0, number=1) == "unknown (no images)"
