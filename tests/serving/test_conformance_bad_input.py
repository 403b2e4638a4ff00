"""Malformed requests on both gRPC front ends.

Each gets a status and one line that says what was expected and what the client sent. The server continues to serve.
"""

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from tests.serving.conftest import MAX_MESSAGE_BYTES, SERVICE, Served
from tests.serving.wrong_requests import INVALID, WRONG, X, good


def send(served: Served, payload: bytes, **options: Any) -> pb.ModelInferResponse:
    call = served.channel.unary_unary(SERVICE + "ModelInfer", None, pb.ModelInferResponse.FromString)
    response: pb.ModelInferResponse = call(payload, timeout=60, **options)
    return response


def refusal(served: Served, payload: bytes, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        send(served, payload, **options)
    return caught.value


@pytest.fixture(autouse=True)
def _serves_on(served: Served) -> Iterator[None]:
    """Checks after each test that the server responds and all queues are empty."""
    yield
    assert send(served, good().SerializeToString()).raw_output_contents[0] == X.tobytes()
    assert not any(model.batcher.num_queued for model in served.server.repository.ready_models())


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(served: Served, case: str) -> None:
    payload, code, sentence = WRONG[case]
    for _ in range(2):  # the second time its plan might be cached
        error = refusal(served, payload)
        assert error.code() == code, error.details()
        assert "\n" not in error.details()
        assert len(error.details()) < 500
        assert re.fullmatch(sentence, error.details()), error.details()


def test_a_message_over_the_limit(served: Served) -> None:
    for size in (MAX_MESSAGE_BYTES + 1, 30 * MAX_MESSAGE_BYTES):
        error = refusal(served, bytes(size))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(MAX_MESSAGE_BYTES) in error.details()


def test_a_message_just_within_the_limit(served: Served) -> None:
    request = pb.ModelInferRequest(model_name="whole")
    request.inputs.add(name="x", datatype="FP32", shape=[(MAX_MESSAGE_BYTES - 100) // 4])
    request.raw_input_contents.append(bytes((MAX_MESSAGE_BYTES - 100) // 4 * 4))
    assert len(send(served, request.SerializeToString()).raw_output_contents[0]) > MAX_MESSAGE_BYTES - 200


def test_metadata_just_within_the_limit(served: Served) -> None:
    """gRPC's core would refuse most of these calls at random, as of callers whose proxy adds long headers."""
    with grpc.insecure_channel(served.target, options=[("test", 15_000)]) as channel:
        call = channel.unary_unary(SERVICE + "ModelInfer")
        for _ in range(20):
            call(good().SerializeToString(), timeout=60, metadata=[("large", "x" * 15_000)])


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_metadata_that_is_too_large(served: Served, size: int) -> None:
    """gRPC's core refuses it; hyper responds with HTTP's status 431, or ends the connection if it is much larger."""
    with grpc.insecure_channel(served.target, options=[("test", size)]) as channel:
        call = channel.unary_unary(SERVICE + "ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(good().SerializeToString(), timeout=60, metadata=[("large", "x" * size)])
    codes = {
        "grpcio": {20_000: grpc.StatusCode.RESOURCE_EXHAUSTED, 200_000: grpc.StatusCode.RESOURCE_EXHAUSTED},
        "native": {20_000: grpc.StatusCode.UNKNOWN, 200_000: grpc.StatusCode.UNAVAILABLE},
    }
    assert caught.value.code() == codes[served.transport][size], caught.value.details()


def test_bytes_that_are_not_http(served: Served) -> None:
    host, _, port = served.target.rpartition(":")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000):
        hung_up = contextlib.suppress(OSError)  # the server may close the connection at any time
        with hung_up, socket.create_connection((host, int(port)), timeout=60) as raw:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass


def test_a_model_error_fails_only_its_batch(served: Served) -> None:
    def ask(index: int) -> bytes:
        request = pb.ModelInferRequest(model_name="failing")
        request.inputs.add(name="index", datatype="INT64", shape=[1, 1]).contents.int64_contents.append(index)
        return bytes(request.SerializeToString())

    error = refusal(served, ask(9))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert error.details().startswith("model 'failing' failed: ")
    assert "\n" not in error.details()
    assert np.frombuffer(send(served, ask(2)).raw_output_contents[0], np.float32).tolist() == [30]


UNARY = (
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)


@pytest.mark.parametrize("method", UNARY)
def test_random_bytes_for_the_other_calls(served: Served, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.channel.unary_unary(SERVICE + method)(b"\xff\xff\xff", timeout=60)
    assert caught.value.code() == INVALID
    assert f"the 3 bytes received are not a {method}Request" in caught.value.details()


@pytest.mark.parametrize("path", ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"])
def test_random_bytes_for_health(served: Served, path: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        next(served.channel.unary_stream(path)(b"\xff\xff\xff", timeout=60))
    assert caught.value.code() == INVALID


def test_wrong_requests_in_a_stream_are_errors_in_it(served: Served) -> None:
    """Clients find the request of an error by its id, and wait for the parameter, as in Triton."""
    call = served.channel.stream_stream(SERVICE + "ModelStreamInfer", None, pb.ModelStreamInferResponse.FromString)
    unknown, right = good(), good()
    unknown.id, unknown.model_name, right.id = "é7", "nothing", "8"
    payloads = [b"\xff\xff", unknown.SerializeToString(), right.SerializeToString()]
    responses = list(call(iter(payloads), timeout=60))
    assert "not a ModelInferRequest" in responses[0].error_message
    assert "unknown model 'nothing'" in responses[1].error_message
    assert responses[2].infer_response.raw_output_contents[0] == X.tobytes()
    assert [message.infer_response.id for message in responses] == ["", "é7", "8"]
    for message in responses:
        assert message.infer_response.parameters["triton_final_response"].bool_param


def test_a_watch_that_never_reads_does_not_block_others(served: Served, client: triton.InferenceServerClient) -> None:
    """HTTP/2's flow control lets it receive nothing, while the models' states change many times."""
    host, _, port = served.target.rpartition(":")
    with socket.create_connection((host, int(port))) as raw:
        no_window = struct.pack(">HI", 4, 0)
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + h2_frame(4, 0, 0, no_window))
        headers = b"".join(
            b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in (
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", b"/grpc.health.v1.Health/Watch"),
                (b":authority", b"test"),
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
            )
        )
        message = health_pb2.HealthCheckRequest(service="spare").SerializeToString()
        raw.sendall(h2_frame(1, 4, 1, headers) + h2_frame(0, 1, 1, struct.pack(">BI", 0, len(message)) + message))
        for _ in range(20):
            client.load_model("spare")
            client.unload_model("spare")


def h2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Returns a frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
