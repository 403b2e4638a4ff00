"""A recipe's results over seeds as a few numbers, with what is sure about them and what is not."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
POWER = 0.8
_TWO_SIDED = (1 + CONFIDENCE) / 2
_FEW_DEGREES = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}
"""The 97.5 % quantiles of Student's t for which the expansion is not good enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Errors over seeds, in the unit that they were given in. Intervals are of 95 %; None for a single run."""

    num_runs: int
    worst: float
    median: float
    best: float
    mean: float
    deviation: float | None
    mean_interval: tuple[float, float] | None
    median_interval: tuple[float, float] | None


def summarize(errors: list[float]) -> Summary:
    """The summary of the errors of one or more runs.

    The mean's interval is Student's, the median's the percentile bootstrap's (10,000 resamples, fixed seed).
    """
    values = np.array(errors, dtype=np.float64)
    mean = float(values.mean())
    deviation = mean_interval = median_interval = None
    if len(values) > 1:
        deviation = float(values.std(ddof=1))
        half = student_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
        mean_interval = (mean - half, mean + half)
        median_interval = bootstrap_median(values)
    return Summary(
        num_runs=len(values),
        worst=float(values.max()),
        median=float(np.median(values)),
        best=float(values.min()),
        mean=mean,
        deviation=deviation,
        mean_interval=mean_interval,
        median_interval=median_interval,
    )


def bootstrap_median(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median of float64 `[N]`."""
    stream = np.random.default_rng(0)
    medians = np.median(values[stream.integers(len(values), size=(NUM_RESAMPLES, len(values)))], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def student_quantile(degrees_of_freedom: int, probability: float = _TWO_SIDED) -> float:
    """A quantile of Student's t, for an interval of 95 % by default.

    The 97.5 % quantile for up to 4 degrees of freedom is from a table, all others by Fisher and Cornish's expansion
    (to 0.3 %, that of 80 % from 2 degrees on).
    """
    if probability == _TWO_SIDED and degrees_of_freedom in _FEW_DEGREES:
        return _FEW_DEGREES[degrees_of_freedom]
    z, n = NormalDist().inv_cdf(probability), float(degrees_of_freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def runs_to_tell_apart(difference: float, deviation: float) -> int:
    """Runs of each of two recipes after which a true difference of their means is found in 8 of 10 comparisons.

    By Student's two-sided test at 5 %, both with this deviation over seeds: the least n, at least 2, with
    n >= 2 * (t_0.975 + t_0.8)^2 * (deviation / difference)^2 for 2n - 2 degrees of freedom.
    """
    normal = NormalDist()
    ratio = 2 * (deviation / difference) ** 2
    runs = max(2, math.ceil(ratio * (normal.inv_cdf(_TWO_SIDED) + normal.inv_cdf(POWER)) ** 2))  # of many, all it takes
    while runs < ratio * (student_quantile(2 * runs - 2) + student_quantile(2 * runs - 2, POWER)) ** 2:
        runs += 1
    return runs
