"""Confidence intervals of accuracies, and the text that reports an accuracy."""

import math
from statistics import NormalDist


def wilson_interval(num_right: int, num_all: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion, 95 % by default (Wilson, JASA 22, 1927)."""
    if num_all == 0:
        return 0.0, 1.0
    p, n = num_right / num_all, num_all
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def confidence_level(number: int) -> float:
    """Returns the confidence level of the interval of the n-th evaluation on a test set: 1 - 0.05 * 6 / (pi * n)^2.

    The error rates of all evaluations, however many there will be, add up to 5 %. So all intervals hold together with
    95 % confidence (the union bound), whichever evaluation a reader picks, at any time.

    Args:
        number: n, counted from 1.
    """
    return 1 - 0.05 * 6 / (math.pi * number) ** 2


def simultaneous_interval(num_right: int, num_all: int, number: int) -> tuple[float, float]:
    """Returns the Wilson interval at the `confidence_level` of the n-th evaluation on a test set."""
    return wilson_interval(num_right, num_all, NormalDist().inv_cdf((1 + confidence_level(number)) / 2))


def describe_accuracy(num_errors: int, num_images: int, *, number: int | None = None) -> str:
    """Returns an accuracy as text, with its counts and its interval.

    Args:
        number: which evaluation on this test set it is, for a `simultaneous_interval`; None for a plain one of 95 %.
    """
    if num_images == 0:
        return "unknown (no images)"
    num_right = num_images - num_errors
    if number is None:
        low, high = wilson_interval(num_right, num_images)
        interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    else:
        low, high = simultaneous_interval(num_right, num_images, number)
        interval = f"interval {100 * low:.2f} to {100 * high:.2f} %, 95 % over all evaluations"
    return f"{100 * (1 - num_errors / num_images):.2f} % ({num_errors:,} of {num_images:,} wrong; {interval})"
