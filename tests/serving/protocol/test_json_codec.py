"""Bodies of HTTP's infer endpoint, without a server."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from serving.errors import InvalidArgument, ServingError
from serving.inference.request import InferOutput, InferRequest, InferResponse, RequestedOutput, SharedRange
from serving.protocol.json_codec import (
    MAX_JSON_BYTES,
    MAX_JSON_LISTS,
    MAX_KEY_CHARS,
    MAX_PARAMETERS,
    MAX_TENSORS,
    MAX_VALUE_CHARS,
    parse_request,
)
from serving.protocol.json_responses import OutputForm, render_response
from serving.protocol.tensors import DATATYPES

LIMIT = 1 << 20


def parse(message: Any, tail: bytes | None = None) -> tuple[InferRequest, OutputForm]:
    body = json.dumps(message).encode()
    return parse_request(body + (tail or b""), None if tail is None else len(body), "m", "1")


def one_input(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2]} | changes]}


def data_of(datatype: str, data: Any, shape: list[int] | None = None) -> list[Any]:
    request, _ = parse(one_input(datatype=datatype, data=data, shape=shape or [2]))
    elements: list[Any] = np.frombuffer(request.inputs[0].data, DATATYPES[datatype].dtype).tolist()
    return elements


class TestParseJson:
    def test_all_fields(self) -> None:
        message = one_input() | {
            "id": "7",
            "parameters": {"timeout": 5, "binary_data_output": True},
            "outputs": [
                {"name": "y", "parameters": {"classification": 3, "binary_data": False}},
                {"name": "z"},
            ],
        }
        request, form = parse(message)
        assert (request.model_name, request.model_version, request.id) == ("m", "1", "7")
        assert request.parameters == {"timeout": 5}
        assert [(output.name, output.classification) for output in request.outputs] == [("y", 3), ("z", 0)]
        assert (form.binary, form.by_name) == (True, {"y": False})
        (given,) = request.inputs
        assert (given.name, given.datatype, given.shape) == ("x", "FP32", (1, 2))
        assert np.frombuffer(given.data, np.float32).tolist() == [1.5, 2.0]

    @pytest.mark.parametrize(
        ("datatype", "data"),
        [
            ("BOOL", [True, False]),
            ("UINT8", [0, 255]),
            ("INT8", [-128, 127]),
            ("UINT16", [0, 65535]),
            ("INT64", [-(2**63), 2**63 - 1]),
            ("UINT64", [0, 2**64 - 1]),
            ("FP32", [0.5, -1]),
            ("FP64", [0.1, 1e300]),
        ],
    )
    def test_each_data_type(self, datatype: str, data: list[Any]) -> None:
        assert data_of(datatype, data) == data

    def test_nested_lists_are_row_major(self) -> None:
        assert data_of("UINT8", [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [2, 2, 2]) == [1, 2, 3, 4, 5, 6, 7, 8]

    @pytest.mark.parametrize("number", [65536, 65537, 200_000])
    def test_many_elements(self, number: int) -> None:
        values = list(range(number))
        assert data_of("INT64", values, [number]) == values

    def test_a_bad_element_among_many_is_named(self) -> None:
        with pytest.raises(InvalidArgument, match=r"got `str` - at `\$\[9\]`, counted from element 65536$"):
            data_of("INT64", [*range(65545), "x", *range(10)], [65556])

    def test_nan_and_infinity_are_accepted_as_in_triton(self) -> None:
        request, _ = parse(one_input(data=[float("inf"), float("nan")]))
        values = np.frombuffer(request.inputs[0].data, np.float32)
        assert np.isinf(values[0])
        assert np.isnan(values[1])

    def test_a_byte_order_mark_is_accepted_as_in_triton(self) -> None:
        request, _ = parse_request(b"\xef\xbb\xbf" + json.dumps(one_input(data=[1, 2])).encode(), None, "m", "")
        assert np.frombuffer(request.inputs[0].data, np.float32).tolist() == [1, 2]

    def test_strings(self) -> None:
        request, _ = parse(one_input(datatype="BYTES", data=["é", ""]))
        assert request.inputs[0].data == b"\x02\0\0\0\xc3\xa9\0\0\0\0"

    def test_no_elements(self) -> None:
        assert data_of("FP32", [], [0, 3]) == []

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"data": [1.5, "2"]}, r"data of input 'x' must be of FP32: Expected `float`, got `str` - at `\$\[1\]`$"),
            ({"data": [1.5, None]}, "must be of FP32: Expected `float`, got `null`"),
            ({"data": [1.5, True]}, "must be of FP32: Expected `float`, got `bool`"),
            ({"data": [1.5, 1e300]}, "does not fit FP32: overflow"),
            ({"data": [1.5, 10**400]}, r"the request does not fit the protocol|must be of FP32: Number out of range"),
            ({"datatype": "UINT8", "data": [1, 256]}, "must be of UINT8: an element does not fit UINT8: .*256"),
            ({"datatype": "UINT8", "data": [1, -1]}, "an element does not fit UINT8"),
            ({"datatype": "INT8", "data": [1, 128]}, "an element does not fit INT8: .*128"),
            ({"datatype": "UINT8", "data": [1, 1.7]}, "must be of UINT8: Expected `int`, got `float`"),
            ({"datatype": "UINT8", "data": [1, 1.0]}, "must be of UINT8: Expected `int`, got `float`"),
            ({"datatype": "UINT8", "data": [1, True]}, "must be of UINT8: Expected `int`, got `bool`"),
            ({"datatype": "INT64", "data": [1, 2**63]}, "an element does not fit INT64"),
            ({"datatype": "BOOL", "data": [True, 1]}, "must be of BOOL: Expected `bool`, got `int`"),
            ({"datatype": "BYTES", "data": ["a", 1]}, "must be of BYTES: Expected `str`, got `int`"),
            ({"datatype": "BYTES", "data": ["a", "\ud800"]}, "does not fit BYTES"),
            ({"data": [1.5, "\ud800"]}, "data of input 'x' must be of FP32"),
            ({"datatype": "FP16"}, "FP16 is only accepted as binary data"),
            ({"datatype": "FLOAT"}, "input 'x': unknown data-type 'FLOAT'"),
            ({"datatype": None}, r"Expected `str`, got `null` - at `\$.inputs\[0\].datatype`"),
            ({"data": [1.5]}, r"expected 2 elements for shape \[1, 2\], got 1"),
            ({"data": [[1.5], 2]}, "ragged"),
            ({"data": [[1.5], [2, 3]]}, "ragged"),
            ({"data": [1.5, [2]]}, "must be of FP32: Expected `float`, got `array`"),
            ({"data": {"0": 1}}, r"Expected `array \| null`, got `object` - at `\$.inputs\[0\].data`"),
            ({"data": [{"0": 1}, 2]}, "must be of FP32: Expected `float`, got `object`"),
            ({"shape": [1, -2]}, r"Expected `int` >= 0 - at `\$.inputs\[0\].shape\[1\]`"),
            ({"shape": [1, 2.0]}, "Expected `int`, got `float`"),
            ({"shape": [1, True]}, "Expected `int`, got `bool`"),
            ({"shape": [1, 2**63]}, "Expected `int` <= 9223372036854775807"),
            ({"shape": [2**62] * 32}, "more elements than"),
            ({"shape": [1] * 33}, "Expected `array` of length <= 32"),
            ({"shape": "1, 2"}, "Expected `array`, got `str`"),
            ({"name": 5}, r"Expected `str`, got `int` - at `\$.inputs\[0\].name`"),
            ({"name": None}, "Expected `str`, got `null`"),
            ({"parameters": []}, r"Expected `object \| null`, got `array` - at `\$.inputs\[0\].parameters`"),
            ({"parameters": {"binary_data_size": 8}}, "both data and a binary_data_size"),
            ({"parameters": {"binary_data_size": "8"}}, "must be a whole number from 0, got '8'"),
            ({"parameters": {"binary_data_size": -8}}, "must be a whole number from 0, got -8"),
            ({"parameters": {"binary_data_size": True}}, "must be a whole number from 0, got True"),
            ({"name": "x" * 1000, "datatype": "FLOAT"}, "input 'x{64}…': unknown data-type"),
        ],
    )
    def test_a_bad_input(self, changes: dict[str, Any], complaint: str) -> None:
        with pytest.raises(InvalidArgument, match=complaint) as raised:
            parse(one_input(**changes))
        assert len(str(raised.value)) < 200

    @pytest.mark.parametrize(
        ("message", "complaint"),
        [
            ([], "the request does not fit the protocol: Expected `object`, got `array`"),
            ({}, "Object missing required field `inputs`"),
            ({"inputs": [5]}, r"Expected `object`, got `int` - at `\$.inputs\[0\]`"),
            ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, "neither data nor a binary_data_size"),
            (one_input() | {"id": 7}, r"Expected `str \| null`, got `int` - at `\$.id`"),
            (one_input() | {"parameters": 7}, r"Expected `object \| null`, got `int` - at `\$.parameters`"),
            (one_input() | {"parameters": {"timeout": [7]}}, "Expected `bool | int | float | str`, got `array`"),
            (one_input() | {"parameters": {"timeout": None}}, "Expected `bool | int | float | str`, got `null`"),
            (one_input() | {"parameters": {"timeout": 10**30}}, "Expected `int` <= 9223372036854775807"),
            (one_input() | {"parameters": {"binary_data_output": 1}}, "must be true or false, got 1"),
            (one_input() | {"outputs": {}}, r"Expected `array \| null`, got `object` - at `\$.outputs`"),
            (one_input() | {"outputs": [{}]}, r"Object missing required field `name` - at `\$.outputs\[0\]`"),
            (one_input() | {"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]}, "must be true or false"),
            (one_input() | {"outputs": [{"name": "y", "parameters": {"classification": -1}}]}, "positive whole number"),
        ],
    )
    def test_a_bad_request(self, message: Any, complaint: str) -> None:
        with pytest.raises(InvalidArgument, match=complaint):
            parse(message)

    def test_null_is_the_same_as_an_absent_field(self) -> None:
        nothing = {"id": None, "outputs": None, "parameters": None}
        request, form = parse(one_input(parameters=None) | nothing)
        assert (request.id, request.outputs, request.parameters, form) == ("", [], {}, OutputForm())
        request, _ = parse({"inputs": [binary_input("a", 3) | {"data": None}]}, b"123")
        assert bytes(request.inputs[0].data) == b"123"  # type: ignore[arg-type]
        request, _ = parse(one_input() | {"outputs": [{"name": "y", "parameters": None}]})
        assert request.outputs == [RequestedOutput("y")]

    @pytest.mark.parametrize(
        "message",
        [
            {"inputs": one_input()["inputs"] * (MAX_TENSORS + 1)},
            one_input() | {"outputs": [{"name": "y"}] * (MAX_TENSORS + 1)},
            one_input() | {"parameters": {str(at): 1 for at in range(MAX_PARAMETERS + 1)}},
            one_input(parameters={str(at): 1 for at in range(MAX_PARAMETERS + 1)}),
            one_input() | {"parameters": {"a": "b" * (MAX_VALUE_CHARS + 1)}},
            one_input() | {"parameters": {"a" * (MAX_KEY_CHARS + 1): 1}},
        ],
        ids=["inputs", "outputs", "parameters", "an input's parameters", "a value", "a key"],
    )
    def test_counts_and_sizes_are_bounded(self, message: Any) -> None:
        with pytest.raises(InvalidArgument, match=r"the request does not fit the protocol: Expected .* of length <= "):
            parse(message)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"\xff",
            b"\xff\xfe{\0}\0",
            b"[" * 90_000,
            b'{"id": ' + b"9" * 5000 + b"}",
            b'"\\ud800"',
            b'{"inputs": [], "\xff": 1}',
        ],
    )
    def test_a_body_that_is_not_json(self, body: bytes) -> None:
        with pytest.raises(InvalidArgument, match="the request"):
            parse_request(body, None, "m", "1")

    @pytest.mark.parametrize("body", [b" " * (MAX_JSON_BYTES + 1), b"[" + b"[]," * MAX_JSON_LISTS + b"[]]"])
    def test_json_that_would_block_the_server(self, body: bytes) -> None:
        with pytest.raises(InvalidArgument, match="send tensors as binary data"):
            parse_request(body, None, "m", "1")

    @pytest.mark.parametrize("what", ["inputs", "outputs"])
    def test_shared_memory(self, what: str) -> None:
        message = one_input() | {"outputs": [{"name": "y"}]}
        message[what][0]["parameters"] = {"shared_memory_region": "r"}
        request, _ = parse(message)
        assert request.uses_shared_memory
        assert request.key is None
        assert getattr(request, what)[0].shared == SharedRange("r", 0, 0)


def binary_input(name: str, size: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": size}}


class TestParseBinary:
    def test_inputs_share_the_bytes_after_the_json(self) -> None:
        inputs = [binary_input("a", 3), one_input()["inputs"][0], binary_input("b", 0), binary_input("c", 2)]
        request, _ = parse({"inputs": inputs}, b"12345")
        assert [bytes(given.data) for given in request.inputs if given.name != "x"] == [b"123", b"", b"45"]

    def test_the_bytes_are_not_copied(self) -> None:
        message = json.dumps({"inputs": [binary_input("a", 3)]}).encode()
        body = message + b"123"
        request, _ = parse_request(body, len(message), "m", "")
        data = request.inputs[0].data
        assert isinstance(data, memoryview)
        assert data.obj is body

    @pytest.mark.parametrize(
        ("sizes", "complaint"),
        [
            ([3, 3], "expected 6 bytes after the JSON, the sum of all binary_data_size, got 5"),
            ([2, 2], "expected 4 bytes after the JSON"),
            ([10**18, 1], "expected 1000000000000000001 bytes"),
            ([], "expected 0 bytes after the JSON"),
        ],
    )
    def test_sizes_that_do_not_add_up(self, sizes: list[int], complaint: str) -> None:
        with pytest.raises(InvalidArgument, match=complaint):
            parse({"inputs": [binary_input(str(at), size) for at, size in enumerate(sizes)]}, b"12345")

    def test_the_header_may_say_that_all_is_json(self) -> None:
        request, _ = parse(one_input(), b"")
        assert np.frombuffer(request.inputs[0].data, np.float32).tolist() == [1.5, 2]  # type: ignore[arg-type]

    def test_without_the_header(self) -> None:
        with pytest.raises(InvalidArgument, match="does not say where the JSON ends"):
            parse({"inputs": [binary_input("a", 0)]})

    def test_json_longer_than_the_body(self) -> None:
        with pytest.raises(InvalidArgument, match="said to have 9 bytes, but the whole body has 2"):
            parse_request(b"{}", 9, "m", "1")


class TestRender:
    def test_json(self) -> None:
        outputs = [
            InferOutput("y", "FP32", (1, 2), np.array([1.5, np.inf], np.float32).tobytes()),
            InferOutput("s", "BYTES", (1,), b"\x02\0\0\0\xc3\xa9"),
        ]
        body, header_length = render_response(InferResponse("m", "2", "", outputs), OutputForm(), LIMIT)
        assert header_length is None
        assert json.loads(body) == {
            "model_name": "m",
            "model_version": "2",
            "outputs": [
                {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, None]},
                {"name": "s", "datatype": "BYTES", "shape": [1], "data": ["é"]},
            ],
        }

    @pytest.mark.parametrize(
        ("datatype", "values"),
        [
            ("INT64", [-(2**63), 2**63 - 1, 2**53 + 1]),
            ("UINT64", [2**64 - 1]),
            ("FP32", [-0.0, 1e-45, 3.4028234663852886e38]),
            ("FP64", [-0.0, 5e-324, 1e16, 0.1]),
            ("BOOL", [True, False]),
        ],
    )
    def test_numbers_stay_numbers_and_exact(self, datatype: str, values: list[Any]) -> None:
        dtype = DATATYPES[datatype].dtype
        output = InferOutput("y", datatype, (len(values),), np.array(values, dtype).tobytes())
        body, _ = render_response(InferResponse("m", "2", "", [output]), OutputForm(), LIMIT)
        data = json.loads(body)["outputs"][0]["data"]
        assert np.array(data, dtype).tobytes() == output.data
        assert [str(value) for value in data] == [str(value) for value in np.array(values, dtype).tolist()]

    @pytest.mark.parametrize("datatype", ["FP32", "FP64"])
    def test_what_json_has_no_number_for_is_null(self, datatype: str) -> None:
        values = np.array([np.nan, np.inf, -np.inf, 0], DATATYPES[datatype].dtype)
        output = InferOutput("y", datatype, (4,), values.tobytes())
        body, _ = render_response(InferResponse("m", "2", "", [output]), OutputForm(), LIMIT)
        assert body.endswith(b'"data":[null,null,null,0.0]}]}')

    def test_large_outputs_are_rendered_in_parts(self) -> None:
        numbers = np.arange(100_000, dtype=np.int64)
        output = InferOutput("y", "INT64", numbers.shape, numbers.tobytes())
        body, _ = render_response(InferResponse("m", "2", "", [output]), OutputForm(), LIMIT)
        assert json.loads(body)["outputs"][0]["data"] == numbers.tolist()

    @pytest.mark.parametrize("form", [OutputForm(), OutputForm(binary=True), OutputForm(by_name={"y": True})])
    @pytest.mark.parametrize("size", [LIMIT // 4 + 1, LIMIT // 2 + 1])
    def test_the_size_of_a_response_is_bounded(self, form: OutputForm, size: int) -> None:
        outputs = [InferOutput(name, "UINT8", (size,), bytes([200]) * size) for name in "yz"]
        if form.is_binary("z") and size < LIMIT // 2:
            assert len(render_response(InferResponse("m", "2", "", outputs), form, LIMIT)[0]) > 2 * size
            return
        with pytest.raises(InvalidArgument, match=f"the response is larger than {LIMIT} bytes: request binary data"):
            render_response(InferResponse("m", "2", "", outputs), form, LIMIT)

    def test_some_outputs_binary(self) -> None:
        outputs = [InferOutput(name, "UINT8", (2,), name.encode() * 2) for name in "abc"]
        body, header_length = render_response(
            InferResponse("m", "2", "\ud800", outputs), OutputForm(True, {"b": False}), LIMIT
        )
        assert body[header_length:] == b"aacc"
        message = json.loads(body[:header_length])
        assert message["id"] == "\ud800"
        assert [output.get("parameters") for output in message["outputs"]] == [
            {"binary_data_size": 2},
            None,
            {"binary_data_size": 2},
        ]
        assert message["outputs"][1]["data"] == [98, 98]

    @pytest.mark.parametrize(
        "output", [InferOutput("y", "FP16", (1,), b"\0\0"), InferOutput("y", "BYTES", (1,), b"\x01\0\0\0\xff")]
    )
    def test_outputs_that_json_cannot_hold(self, output: InferOutput) -> None:
        response = InferResponse("m", "2", "", [output])
        with pytest.raises(InvalidArgument, match="request binary data"):
            render_response(response, OutputForm(), LIMIT)
        assert render_response(response, OutputForm(binary=True), LIMIT)[0].endswith(bytes(output.data))


@given(npst.arrays(np.float32, npst.array_shapes(max_dims=4)))
def test_a_tensor_survives_json_both_ways(array: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    message = one_input(shape=list(array.shape), data=array.tolist())
    request, form = parse(message)
    given = request.inputs[0]
    body, _ = render_response(
        InferResponse("m", "1", "", [InferOutput("y", "FP32", given.shape, given.data)]), form, LIMIT
    )
    (output,) = json.loads(body, parse_constant=pytest.fail)["outputs"]
    expected = np.where(np.isfinite(array), array, np.nan)
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(output["shape"]), expected)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["FP32", "BYTES"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
parameters = st.dictionaries(st.sampled_from(["binary_data_size", "binary_data", "classification"]), values) | values
tensors = st.fixed_dictionaries(
    {}, optional={"name": values, "shape": values, "datatype": values, "data": values, "parameters": parameters}
)
requests = st.fixed_dictionaries(
    {},
    optional={"id": values, "parameters": values, "inputs": st.lists(tensors) | values, "outputs": st.lists(tensors)},
)


@given(requests | values, st.binary(max_size=8), st.none() | st.integers(0, 200))
def test_any_json_is_a_request_or_a_serving_error(message: Any, tail: bytes, header_length: int | None) -> None:
    with contextlib.suppress(ServingError):
        parse_request(json.dumps(message).encode() + tail, header_length, "m", "1")
