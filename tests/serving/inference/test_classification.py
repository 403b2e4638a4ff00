"""Classification: an output's largest values as strings."""

import math

import numpy as np

from serving.inference.classification import classify


def test_the_largest_values_come_first() -> None:
    rows = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32)
    assert classify(rows, 2, ["a", "b", "c"]).tolist() == [
        [b"0.700000:1:b", b"0.200000:2:c"],
        [b"0.500000:0:a", b"0.250000:1:b"],
    ]


def test_missing_labels_are_left_out() -> None:
    assert classify(np.array([[1, 3, 2]]), 9, ["zero", "one"]).tolist() == [
        [b"3.000000:1:one", b"2.000000:2", b"1.000000:0:zero"]
    ]


def test_nan_is_not_the_largest_value() -> None:
    strings = classify(np.array([[math.nan, 1.0, math.inf]], np.float32), 3, [])[0]
    assert strings.tolist()[0] == b"inf:2"
    assert len(strings) == 3
