"""Classification: an output's largest values as strings."""

import math

import numpy as np
import pytest

from serving.errors import InvalidArgument
from serving.inference.classification import classify


def test_the_largest_values_come_first() -> None:
    rows = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32)
    assert classify(rows, 2, ["a", "b", "c"]).tolist() == [
        [b"0.700000:1:b", b"0.200000:2:c"],
        [b"0.500000:0:a", b"0.250000:1:b"],
    ]


def test_missing_labels_are_left_out() -> None:
    rows = np.array([[0.1, 0.3, 0.2]])
    assert classify(rows, 9, ["", "one"]).tolist() == [[b"0.300000:1:one", b"0.200000:2", b"0.100000:0"]]


def test_whole_numbers_are_exact() -> None:
    rows = np.array([[3, 2**53 + 1, -4]])
    assert classify(rows, 3, []).tolist() == [[b"9007199254740993:1", b"3:0", b"-4:2"]]


def test_nan_is_not_the_largest_value() -> None:
    strings = classify(np.array([[math.nan, 1.0, math.inf]], np.float32), 3, [])[0]
    assert strings.tolist()[0] == b"inf:2"
    assert len(strings) == 3


def test_values_of_every_type_are_ordered() -> None:
    for dtype in (np.uint8, np.uint64, np.int8, np.int64, np.float16, np.float64, np.bool_):
        low, high = (0, 1) if dtype in (np.bool_, np.uint8, np.uint64) else (-1, 1)
        assert [string.split(b":")[1] for string in classify(np.array([[low, high, low]], dtype), 2, [])[0]] == [
            b"1",
            b"0",
        ], dtype
    smallest, largest = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    assert [string.split(b":")[1] for string in classify(np.array([[smallest, largest, largest - 1]]), 3, [])[0]] == [
        b"1",
        b"2",
        b"0",
    ]


@pytest.mark.parametrize("top_k", [1, 3, 10, 40])
def test_few_of_many_are_the_first_of_all(top_k: int) -> None:
    """Equal values and NaN are common, so that a selection and a full sort could differ."""
    rows = np.random.default_rng(0).integers(0, 5, (20, 200)).astype(np.float32)
    rows[:, ::3] = np.nan
    rows[3] = np.nan
    full = classify(rows, 200, [])
    assert classify(rows, top_k, []).tolist() == full[:, :top_k].tolist()


def test_the_number_of_strings_is_bounded() -> None:
    rows = np.zeros((2, 1 << 20), np.float32)
    with pytest.raises(InvalidArgument, match="expected at most 65536 classes in a response, got 32769 for each of 2"):
        classify(rows, 32_769, [])
    assert classify(rows, 5, [])[1].tolist() == [f"0.000000:{index}".encode() for index in range(5)]
