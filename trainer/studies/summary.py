"""Statistics of a recipe's results over seeds: a summary with intervals, and the runs that a comparison needs."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
_TWO_SIDED = (1 + CONFIDENCE) / 2
_STUDENT_QUANTILES = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}
"""97.5 % quantiles of Student's t by degrees of freedom, where the expansion is not accurate enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """A summary of errors over seeds, in the unit of the errors.

    Args:
        std: sample standard deviation; None for a single run.
        mean_interval: 95 % interval (low, high); None for a single run.
        median_interval: 95 % interval (low, high); None for fewer than six runs, whose extremes enclose it less often.
    """

    num_runs: int
    worst: float
    median: float
    best: float
    mean: float
    std: float | None
    mean_interval: tuple[float, float] | None
    median_interval: tuple[float, float] | None


def summarize_errors(errors: list[float]) -> ErrorSummary:
    """Summarises the errors of one or more runs, which are not negative.

    The interval of the mean is Student's, cut off at 0; that of the median lies between two of the errors.
    """
    values = np.array(errors, dtype=np.float64)
    mean = float(values.mean())
    std = mean_interval = median_interval = None
    if len(values) > 1:
        std = float(values.std(ddof=1))
        half = student_quantile(len(values) - 1) * std / math.sqrt(len(values))
        mean_interval = (max(0.0, mean - half), mean + half)
        median_interval = interval_of_median(values)
    return ErrorSummary(
        num_runs=len(values),
        worst=float(values.max()),
        median=float(np.median(values)),
        best=float(values.min()),
        mean=mean,
        std=std,
        mean_interval=mean_interval,
        median_interval=median_interval,
    )


def interval_of_median(values: np.ndarray) -> tuple[float, float] | None:
    """Returns two of the values, float64 `[N]`, that enclose the median with at least 95 %; None of fewer than 6.

    A value is below the median of its distribution, whatever that is, with a probability of 1/2. So the k-th lowest and
    the k-th highest value miss the median with that of fewer than k heads, or tails, in N tosses of a coin.
    """
    tosses, rank, outcomes = len(values), 0, 1
    while outcomes / 2**tosses <= (1 - CONFIDENCE) / 2:
        rank += 1
        outcomes += math.comb(tosses, rank)
    ordered = np.sort(values)
    return (float(ordered[rank - 1]), float(ordered[-rank])) if rank else None


def student_quantile(degrees_of_freedom: int, probability: float = _TWO_SIDED) -> float:
    """Returns a quantile of Student's t, by default that of a two-sided interval of 95 %.

    The 97.5 % quantile for up to 4 degrees of freedom comes from a table. All others come from the Cornish-Fisher
    expansion, accurate to 0.3 % (the 80 % quantile from 2 degrees of freedom on).
    """
    if probability == _TWO_SIDED and degrees_of_freedom in _STUDENT_QUANTILES:
        return _STUDENT_QUANTILES[degrees_of_freedom]
    z, n = NormalDist().inv_cdf(probability), float(degrees_of_freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def required_runs(difference: float, std: float) -> int:
    """Returns how many runs of each of two recipes detect a true difference of their means with a power of 80 %.

    The test is Student's two-sided one at 5 %, with equal standard deviations over seeds. The result is the least
    n >= 2 with n >= 2 * (t_0.975 + t_0.8)^2 * (std / difference)^2, where t has 2n - 2 degrees of freedom.
    """
    normal = NormalDist()
    ratio = 2 * (std / difference) ** 2
    # Start from the normal approximation, which is exact for large n.
    runs = max(2, math.ceil(ratio * (normal.inv_cdf(_TWO_SIDED) + normal.inv_cdf(POWER)) ** 2))
    while runs < ratio * (student_quantile(2 * runs - 2) + student_quantile(2 * runs - 2, POWER)) ** 2:
        runs += 1
    return runs
