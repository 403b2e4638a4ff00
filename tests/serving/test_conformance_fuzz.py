"""Random bytes, on both gRPC front ends: no response may show a defect, and the server continues to serve."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from protos import grpc_service_pb2 as pb
from serving.protocol.methods import HEALTH_CHECK
from tests.serving.conftest import SERVICE, Served

X = np.arange(8, dtype=np.float32).reshape(2, 4)
DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
CONTROL = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "TraceSetting",
)

fuzzing = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def good() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="rows", id="an id")
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)
    request.outputs.add(name="echo").parameters["classification"].int64_param = 2
    request.parameters["timeout"].int64_param = 10_000_000
    request.raw_input_contents.append(X.tobytes())
    return request


def typed() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="pair")
    request.inputs.add(name="a", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    request.inputs.add(name="b", datatype="INT64", shape=[1, 1]).contents.int64_contents.append(3)
    return request


def strings() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="strings")
    request.inputs.add(name="text", datatype="BYTES", shape=[1, 2])
    request.raw_input_contents.append(b"\x03\0\0\0one\x02\0\0\0\xff\xfe")
    return request


def plain() -> pb.ModelInferRequest:
    """The form whose plan the server caches."""
    request = pb.ModelInferRequest(model_name="rows")
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)
    request.raw_input_contents.append(X.tobytes())
    return request


SEEDS = [make().SerializeToString() for make in (good, typed, strings, plain)]


@pytest.fixture(autouse=True)
def _serves_on(served: Served) -> Iterator[None]:
    yield
    response = pb.ModelInferResponse.FromString(
        served.channel.unary_unary(SERVICE + "ModelInfer")(SEEDS[3], timeout=60)
    )
    assert response.raw_output_contents[0] == X.tobytes()


def check_status(served: Served, path: str, payload: bytes) -> None:
    """Sends a payload and checks that the status shows no defect."""
    call = served.channel.unary_unary(path).future(payload, timeout=60)
    code, details = call.code(), call.details()
    assert code not in DEFECTS, details
    assert code != grpc.StatusCode.UNAVAILABLE or "not ready" in details, details
    assert code != grpc.StatusCode.DEADLINE_EXCEEDED or "too late" in details, details


@fuzzing
@given(payload=st.binary(max_size=300))
@example(payload=b"")
def test_random_bytes(served: Served, payload: bytes) -> None:
    check_status(served, SERVICE + "ModelInfer", payload)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good message with a few bytes changed, removed or inserted, or cut off."""
    message = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(message)))
        kind = draw(st.sampled_from(["change", "change", "remove", "insert", "cut"]))
        if kind == "insert":
            message[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif kind == "remove":
            del message[at : at + draw(st.integers(1, 8))]
        elif kind == "cut":
            del message[at:]
        elif at < len(message):
            message[at] = draw(st.integers(0, 255))
    return bytes(message)


@fuzzing
@given(payload=mutated())
def test_mutated_messages(served: Served, payload: bytes) -> None:
    check_status(served, SERVICE + "ModelInfer", payload)


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_good_messages_cut_off_anywhere(served: Served, seed: int) -> None:
    calls = [
        served.channel.unary_unary(SERVICE + "ModelInfer").future(SEEDS[seed][:end], timeout=60)
        for end in range(len(SEEDS[seed]))
    ]
    for call in calls:
        assert call.code() not in (*DEFECTS, grpc.StatusCode.UNAVAILABLE), call.details()


names = st.sampled_from(["rows", "pair", "strings", "digits", "whole", "", "x", "y\0"]) | st.text(max_size=5)
shapes = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), max_size=5)
tensors = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["x", "a", "b", "text", "images"]),
    datatype=st.sampled_from(["FP32", "INT64", "BYTES", "UINT8", "FP64", "", "fp32"]),
    shape=shapes,
    contents=st.none()
    | st.builds(
        pb.InferTensorContents,
        fp32_contents=st.lists(st.floats(width=32), max_size=5),
        int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
        bytes_contents=st.lists(st.binary(max_size=9), max_size=5),
    ),
)
requests = st.builds(
    pb.ModelInferRequest,
    model_name=names,
    model_version=st.sampled_from(["", "1", "-1", "٣", "9" * 30]),
    id=st.text(max_size=9),
    inputs=st.lists(tensors, max_size=3),
    outputs=st.lists(
        st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=st.sampled_from(["echo", "sum", "z"])),
        max_size=3,
    ),
    raw_input_contents=st.lists(st.binary(max_size=40), max_size=3),
)


@fuzzing
@given(request=requests)
def test_inconsistent_messages(served: Served, request: pb.ModelInferRequest) -> None:
    check_status(served, SERVICE + "ModelInfer", request.SerializeToString())


@settings(fuzzing, max_examples=60)
@given(method=st.sampled_from(CONTROL), payload=st.binary(max_size=60))
def test_random_bytes_for_the_other_calls(served: Served, method: str, payload: bytes) -> None:
    check_status(served, SERVICE + method, payload)


@settings(fuzzing, max_examples=60)
@given(payload=st.binary(max_size=60))
def test_random_bytes_for_health(served: Served, payload: bytes) -> None:
    check_status(served, HEALTH_CHECK, payload)


@settings(fuzzing, max_examples=30)
@given(payloads=st.lists(st.binary(max_size=60) | mutated(), max_size=5))
def test_random_bytes_in_a_stream(served: Served, payloads: list[bytes]) -> None:
    call = served.channel.stream_stream(SERVICE + "ModelStreamInfer", None, pb.ModelStreamInferResponse.FromString)
    assert len(list(call(iter(payloads), timeout=60))) == len(payloads), "each request has a response in the stream"
