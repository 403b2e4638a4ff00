"""Triton's classification extension: the largest values of an output, as strings.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from collections.abc import Sequence

import numpy as np

from serving.protocol.tensors import Array


def classify(rows: Array, top_k: int, labels: Sequence[str]) -> Array:
    """Returns the largest values of each row as strings `value:index:label`.

    Args:
        rows: numbers, shape (N, M).
        labels: of the M indices. The string ends after the index where there is no label.

    Returns:
        bytes objects, shape (N, min(top_k, M)), largest value first; of equal values, the lowest index first.
    """
    top_k = min(top_k, rows.shape[1])
    largest = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :top_k]
    strings = np.empty(largest.shape, object)
    for place, column in np.ndenumerate(largest):
        index = int(column)
        label = f":{labels[index]}" if index < len(labels) else ""
        strings[place] = f"{rows[place[0], index]:f}:{index}{label}".encode()
    return strings
