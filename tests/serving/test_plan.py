"""Plans: what is checked once, and how answers look on the wire."""

import math

import numpy as np
from google.protobuf.internal.decoder import _DecodeVarint  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st

from serving.plan import classify, varint


@given(st.integers(0, 2**40))
def test_varints_are_protobufs(number: int) -> None:
    encoded = varint(number)
    assert _DecodeVarint(encoded, 0) == (number, len(encoded))


def test_classification_gives_the_largest_values_first() -> None:
    rows = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32)
    assert classify(rows, 2, ["a", "b", "c"]).tolist() == [
        [b"0.700000:1:b", b"0.200000:2:c"],
        [b"0.500000:0:a", b"0.250000:1:b"],
    ]


def test_classification_without_labels_or_with_too_few() -> None:
    assert classify(np.array([[1, 3, 2]]), 9, ["zero", "one"]).tolist() == [
        [b"3.000000:1:one", b"2.000000:2", b"1.000000:0:zero"]
    ]


def test_classification_survives_what_is_no_number() -> None:
    strings = classify(np.array([[math.nan, 1.0, math.inf]], np.float32), 3, [])[0]
    assert strings.tolist()[0] == b"inf:2"
    assert len(strings) == 3
