"""Triton's classification extension: the largest values of an output, as strings.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from collections.abc import Sequence

import numpy as np

from serving.errors import InvalidArgument
from serving.protocol.tensors import Array

MAX_CLASSES = 1 << 16
"""Strings in one output of a response: they are made one by one, in about 40 ms."""


def classify(rows: Array, top_k: int, labels: Sequence[str]) -> Array:
    """Returns the largest values of each row as strings `value:index:label`.

    Args:
        rows: numbers, shape (N, M).
        labels: of the M indices. The string ends after the index where there is none, or an empty one.

    Returns:
        bytes objects, shape (N, min(top_k, M)), largest value first; of equal values, the lowest index first.

    Raises:
        InvalidArgument: the result would have too many strings.
    """
    top_k = min(top_k, rows.shape[1])
    if len(rows) * top_k > MAX_CLASSES:
        raise InvalidArgument(
            f"classification: expected at most {MAX_CLASSES} classes in a response, got {top_k} for each of "
            f"{len(rows)} rows"
        )
    form = "f" if rows.dtype.kind == "f" else "d"
    strings = np.empty((len(rows), top_k), object)
    for place, row in enumerate(rows):
        largest = _largest(row, top_k)
        values = row[largest].tolist()
        for column, (value, index) in enumerate(zip(values, largest.tolist(), strict=True)):
            label = f":{labels[index]}" if index < len(labels) and labels[index] else ""
            strings[place, column] = f"{value:{form}}:{index}{label}".encode()
    return strings


def _largest(row: Array, top_k: int) -> Array:
    """Returns the indices of the largest values, in linear time where few are asked for."""
    ascending = -row if row.dtype.kind == "f" else ~row  # without overflow, also for unsigned integers
    if 4 * top_k >= len(row):
        return np.argsort(ascending, kind="stable")[:top_k]
    last = np.partition(ascending, top_k - 1)[top_k - 1]
    candidates = np.flatnonzero(~(ascending > last))  # also NaN, which is sorted to the end
    return candidates[np.argsort(ascending[candidates], kind="stable")[:top_k]]
