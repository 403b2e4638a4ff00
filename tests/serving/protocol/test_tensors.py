"""Tensors to bytes and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.errors import InvalidArgument
from serving.protocol import tensors
from serving.protocol.tensors import DATATYPES, TensorSpec, from_elements, num_elements, to_array, to_bytes

NUMERIC = [datatype for datatype in DATATYPES.values() if datatype.size]


@given(st.data(), st.sampled_from(NUMERIC), hnp.array_shapes(max_dims=3, max_side=4))
def test_numbers_survive_the_wire(data: st.DataObject, datatype, shape) -> None:
    array = data.draw(hnp.arrays(datatype.dtype, shape))
    back = to_array(datatype, shape, to_bytes(array))
    assert back.dtype == datatype.dtype
    assert back.tobytes() == array.tobytes()
    assert back.shape == shape


@given(st.lists(st.binary(max_size=9), max_size=6))
def test_strings_survive_the_wire(elements: list[bytes]) -> None:
    datatype = DATATYPES["BYTES"]
    encoded = from_elements(datatype, elements)
    assert list(to_array(datatype, (len(elements),), encoded)) == elements


@pytest.mark.parametrize(
    ("data", "needed", "left"), [(b"\x05\0\0\0abc", 9, 7), (b"\x01\0", 5, 2), (b"\xff\xff\xff\xffa", 2**32 + 3, 5)]
)
def test_strings_that_are_cut_off_are_refused(data: bytes, needed: int, left: int) -> None:
    with pytest.raises(InvalidArgument, match=f"cut off: element 1 needs {needed} bytes, {left} are left"):
        to_array(DATATYPES["BYTES"], (2,), b"\x01\0\0\0a" + data)


def test_the_number_of_strings_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_STRINGS", 2)
    assert to_array(DATATYPES["BYTES"], (2,), bytes(8)).tolist() == [b"", b""]
    with pytest.raises(InvalidArgument, match="a BYTES tensor of 3 elements is too large: at most 2 are accepted"):
        to_array(DATATYPES["BYTES"], (3,), bytes(12))
    with pytest.raises(InvalidArgument, match=r"expected 2 BYTES elements .* got 1"):
        to_array(DATATYPES["BYTES"], (2,), from_elements(DATATYPES["BYTES"], ["one"]))


def test_reading_does_not_copy() -> None:
    data = bytearray(b"\1\2\3\4")
    array = to_array(DATATYPES["UINT8"], (4,), data)
    data[0] = 9
    assert array[0] == 9


@pytest.mark.parametrize(
    ("name", "elements"), [("UINT8", [256]), ("UINT8", [-1]), ("INT8", [128]), ("FP32", ["x"]), ("BYTES", [3])]
)
def test_an_element_that_does_not_fit_is_refused(name: str, elements: list) -> None:
    with pytest.raises(InvalidArgument, match=name):
        from_elements(DATATYPES[name], elements)


def test_a_spec_accepts_any_size_where_it_says_so() -> None:
    spec = TensorSpec("images", DATATYPES["UINT8"], (-1, 1, 28, 28))
    assert spec.accepts((7, 1, 28, 28))
    assert not spec.accepts((7, 3, 28, 28))
    assert not spec.accepts((1, 28, 28))


def test_a_huge_shape_does_not_overflow() -> None:
    assert num_elements((2**62, 2**62)) == 2**124
