"""Balanced accuracy: the mean recall of the classes, which a class with few images changes as much as a large one.

See Brodersen et al., "The balanced accuracy and its posterior distribution" (ICPR 2010).
"""

import statistics

NAMED_DIFFERENCE = 0.02
"""The line about an accuracy names the balanced accuracy if the two differ by more than this."""


def balanced_accuracy(recall_by_class: dict[str, float]) -> float:
    """Returns the mean recall of the classes that have images; 0 if there are none."""
    return statistics.fmean(recall_by_class.values()) if recall_by_class else 0.0


def describe_balance(accuracy: float, recall_by_class: dict[str, float]) -> str:
    """Returns text to follow an accuracy: balanced accuracy and worst class, or nothing if the two are close."""
    balanced = balanced_accuracy(recall_by_class)
    if not recall_by_class or abs(balanced - accuracy) <= NAMED_DIFFERENCE:
        return ""
    worst = min(recall_by_class, key=lambda name: recall_by_class[name])
    recall = f"worst class: {worst!r}, recall {100 * recall_by_class[worst]:.2f} %"
    return f", balanced accuracy {100 * balanced:.2f} % ({recall})"
