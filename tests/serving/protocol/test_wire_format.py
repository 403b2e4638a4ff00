"""Requests are split as protobuf itself reads them, and refused before many objects are made of few bytes."""

import time
import tracemalloc

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.grpc_service_pb2 import ModelInferRequest
from serving.errors import InvalidArgument
from serving.protocol.grpc_codec import parse_request
from serving.protocol.tensors import MAX_RANK
from serving.protocol.wire_format import MAX_FIELDS, MAX_KEY_BYTES, MAX_UNPACKED_ELEMENTS, SplitRequest, check_budget


def message(request_id: str = "", tensors: int = 2, size: int = 784, padding: int = 1) -> ModelInferRequest:
    made = ModelInferRequest(model_name="m", id=request_id)
    for number in range(tensors):
        made.inputs.add(name=f"input {number}", datatype="UINT8", shape=[1, size])
        made.raw_input_contents.append(bytes([number]) * size)
    made.outputs.add(name="y").parameters["classification"].int64_param = 3
    made.parameters["note"].string_param = "x" * padding
    return made


def assert_split_as_protobuf_reads(payload: bytes) -> None:
    expected = ModelInferRequest.FromString(payload)
    split = SplitRequest(payload)
    assert split.request_id == expected.id
    assert [bytes(tensor) for tensor in split.tensors] == list(expected.raw_input_contents)
    expected.ClearField("id")
    expected.ClearField("raw_input_contents")
    assert ModelInferRequest.FromString(split.header) == expected


@pytest.mark.parametrize("request_id", ["", "7", "größe" * 50])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 70_000])
def test_a_message_is_split_into_header_id_and_tensors(request_id: str, size: int) -> None:
    assert_split_as_protobuf_reads(message(request_id, size=size).SerializeToString())


@given(st.integers(0, 3), st.text(max_size=200), st.integers(0, 300), st.binary(max_size=40), st.randoms())
def test_fields_may_come_in_any_order_and_twice(tensors, request_id, size, unknown, random) -> None:  # type: ignore[no-untyped-def]
    """The last id counts; fields that this version of the protocol does not know are passed over."""
    parts = [
        ModelInferRequest(id=request_id).SerializeToString(),
        ModelInferRequest(model_name="m", id="first").SerializeToString(),
        b"\xfa\x01" + bytes([len(unknown)]) + unknown,  # field 31
        b"\x78\xff\x01",  # field 15, a number
        b"\x75four",  # field 14, four bytes
        b"\x71eight   ",  # field 14, eight bytes
        *(ModelInferRequest(raw_input_contents=[bytes(size + n)]).SerializeToString() for n in range(tensors)),
    ]
    random.shuffle(parts)
    assert_split_as_protobuf_reads(b"".join(parts))


@pytest.mark.parametrize("last", [0x00, 0x02, 0x3C, 0x7E])
def test_bits_of_a_length_beyond_the_64th_have_no_meaning(last: int) -> None:
    """The tenth byte of a number has one bit to give; it is 0 in these. There is no eleventh."""
    length = bytes([0x80 | 6, *[0x80] * 8, last])
    assert_split_as_protobuf_reads(b"\n" + length + b"digits" + message().SerializeToString())
    with pytest.raises(InvalidArgument, match="a field is malformed"):
        SplitRequest(b"\n" + length[:-1] + bytes([last | 0x80, 0]) + b"digits")


@given(st.data())
def test_what_protobuf_refuses_is_refused(data: st.DataObject) -> None:
    """A damaged message is split and parsed as protobuf reads it, or refused."""
    damaged = bytearray(message("id", size=5).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        expected = ModelInferRequest.FromString(payload)
    except DecodeError:
        with pytest.raises(InvalidArgument):
            parse_request(SplitRequest(payload))
        return
    try:
        split = SplitRequest(payload)
    except InvalidArgument:
        return  # groups, which proto3 does not have
    assert split.request_id == expected.id
    assert [bytes(tensor) for tensor in split.tensors] == list(expected.raw_input_contents)


def many(field: bytes, count: int) -> bytes:
    return ModelInferRequest(model_name="m").SerializeToString() + field * count


def field(number: int, content: bytes) -> bytes:
    """Returns a length-delimited field."""
    raw: bytes = ModelInferRequest(raw_input_contents=[content]).SerializeToString()
    return bytes([number << 3 | 2]) + raw[1:]


def inside_an_input(content: bytes) -> bytes:
    return field(5, content)


EXPENSIVE = {
    "inputs that name a data type and nothing else": many(b"\x2a\x06\x12\x04FP32", 225_000),
    "empty inputs": many(b"\x2a\x00", 900_000),
    "empty outputs": many(b"\x32\x00", 900_000),
    "parameters": many(b"\x22\x05\x0a\x01a\x12\x00", 250_000),
    "empty tensors": many(b"\x3a\x00", 900_000),
    "fields that nobody knows": many(b"\x78\x01", 900_000),
    "parameters of an input": inside_an_input(b"\x22\x05\x0a\x01a\x12\x00" * 250_000),
    "parameters of an output": field(6, b"\x1a\x00" * 900_000),
    "dimensions": inside_an_input(
        b"\x1a" + ModelInferRequest(raw_input_contents=[b"\x01" * 900_000]).SerializeToString()[1:]
    ),
    "dimensions that are not packed": inside_an_input(b"\x18\x01" * 900_000),
    "empty strings": inside_an_input(field(5, b"\x42\x00" * 900_000)),
    "numbers that are not packed": inside_an_input(field(5, b"\x10\x01" * 900_000)),
}


@pytest.mark.parametrize("payload", EXPENSIVE.values(), ids=EXPENSIVE)
def test_a_message_of_many_small_parts_is_refused_before_objects_are_made(payload: bytes) -> None:
    assert 900_000 < len(payload) < 2_500_000
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(InvalidArgument):
            check_budget(SplitRequest(payload).header)
        spent, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 15 * len(payload)
    assert spent < 2.0  # parsing the first of them took 1.2 s without tracemalloc, which slows this tenfold


@pytest.mark.parametrize("number", [MAX_FIELDS - 1, MAX_FIELDS])
def test_the_number_of_fields_is_bounded(number: int) -> None:
    payload = many(b"\x3a\x00", number)
    if number < MAX_FIELDS:
        assert len(SplitRequest(payload).tensors) == number
    else:
        with pytest.raises(InvalidArgument, match=f"^the message has more than {MAX_FIELDS} fields$"):
            SplitRequest(payload)


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_the_fields_of_all_inputs_and_outputs_are_bounded_together(kind: str) -> None:
    made = ModelInferRequest()
    for name in "ab":
        getattr(made, kind).add(name=name).parameters["note"].bool_param = True
    used = sum(len(part.ListFields()) + 1 for part in getattr(made, kind))
    for number in range(MAX_FIELDS - used):
        getattr(made, kind)[number % 2].parameters[str(number)].bool_param = True
    check_budget(made.SerializeToString())
    getattr(made, kind)[0].parameters["one more"].bool_param = True
    with pytest.raises(InvalidArgument, match=f"^the message has more than {MAX_FIELDS} fields$"):
        parse_request(SplitRequest(made.SerializeToString()))


def test_a_shape_may_have_all_dimensions_and_each_ten_bytes() -> None:
    made = ModelInferRequest(model_name="m")
    made.inputs.add(name="x", shape=[-1] * MAX_RANK)  # checked against the model, later
    check_budget(made.SerializeToString())


def test_strings_in_typed_contents_are_bounded() -> None:
    """Those of all inputs together."""
    made = ModelInferRequest(model_name="m")
    for name in "xy":
        contents = made.inputs.add(name=name, datatype="BYTES", shape=[MAX_UNPACKED_ELEMENTS // 2]).contents
        contents.bytes_contents.extend([b""] * (MAX_UNPACKED_ELEMENTS // 2))
    check_budget(made.SerializeToString())
    contents.bytes_contents.append(b"")
    with pytest.raises(InvalidArgument, match=r"use raw_input_contents$"):
        check_budget(made.SerializeToString())


def test_a_key_holds_no_data_and_is_bounded() -> None:
    one, other = (SplitRequest(message(name, size=3).SerializeToString()) for name in ("a", "b"))
    assert one.key == other.key == one.header
    left = MAX_KEY_BYTES - len(SplitRequest(message(padding=MAX_KEY_BYTES).SerializeToString()).header)
    longest, longer = (SplitRequest(message(padding=MAX_KEY_BYTES + n).SerializeToString()) for n in (left, left + 1))
    assert (len(longest.header), longer.key) == (MAX_KEY_BYTES, None)
    assert longest.key == longest.header
    typed = ModelInferRequest(model_name="m")
    typed.inputs.add(name="x", datatype="FP32", shape=[1]).contents.fp32_contents.append(1.5)
    assert SplitRequest(typed.SerializeToString()).key is None
