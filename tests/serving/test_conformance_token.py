"""A server with a token, on both gRPC front ends: everything except health needs it."""

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from serving import models_command
from serving.client import Client, ClientError
from serving.config import ServeConfig
from serving.protocol.methods import HEALTH_CHECK, HEALTH_WATCH
from tests.serving.conftest import SERVICE, Served, serve, tensor

X = np.ones((1, 4), np.float32)
STREAMS = (SERVICE + "ModelStreamInfer", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")


@pytest.fixture(scope="module", params=["native", "grpcio"])
def guarded(
    request: pytest.FixtureRequest, model_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    token_file = tmp_path_factory.mktemp("secrets") / "token"
    token_file.write_text("sesame\n")
    yield from serve(
        ServeConfig(
            model_repository=model_repository,
            model_control_mode="explicit",
            load_model=("rows",),
            token_file=token_file,
            transport=request.param,
            grpc_port=0,
            http_port=0,
            metrics_port=0,
            device="cpu",
            num_threads=1,
        )
    )


UNARY = ("ModelInfer", "ServerLive", "ServerReady", "ModelConfig", "RepositoryModelUnload", "TraceSetting")
WRONG = [
    (),
    (("authorization", "Bearer wrong"),),
    (("authorization", "sesame"),),
    (("authorization", "Bearer "),),
]


@pytest.mark.parametrize("metadata", WRONG, ids=["none", "wrong", "bare", "empty"])
def test_calls_without_the_token_are_refused(guarded: Served, metadata: tuple[tuple[str, str], ...]) -> None:
    options = {"timeout": 60, "metadata": metadata}
    before = num_refused(guarded)
    calls = [guarded.channel.unary_unary(SERVICE + name).future(b"", **options) for name in UNARY]
    calls += [guarded.channel.stream_stream(path)(iter([b""]), **options) for path in STREAMS]
    for call in calls:
        assert call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert "sesame" not in call.details()
    assert num_refused(guarded) == before + len(calls)


def num_refused(guarded: Served) -> int:
    text = httpx.get(f"http://127.0.0.1:{guarded.server.http.metrics_port}/metrics").text
    found = re.search(r'^convoy_refused_requests_total{model="",reason="unauthenticated"} (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0


def test_calls_with_the_token_are_served(guarded: Served) -> None:
    with Client(guarded.target, token="sesame") as ours:
        assert ours.is_ready("rows")
        np.testing.assert_array_equal(ours.infer("rows", {"x": X})["echo"], X)
    with triton.InferenceServerClient(guarded.target) as theirs:
        headers = {"authorization": "Bearer sesame"}
        np.testing.assert_array_equal(theirs.infer("rows", [tensor("x", X)], headers=headers).as_numpy("echo"), X)
    responses = guarded.channel.stream_stream(
        SERVICE + "ModelStreamInfer", None, pb.ModelStreamInferResponse.FromString
    )
    request = pb.ModelInferRequest(model_name="nothing").SerializeToString()
    messages = list(responses(iter([request]), timeout=60, metadata=[("authorization", "Bearer sesame")]))
    assert "unknown model 'nothing'" in messages[0].error_message


def test_our_client_names_the_missing_token(guarded: Served, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(guarded.target) as ours, pytest.raises(ClientError, match="UNAUTHENTICATED: expected metadata"):
        ours.is_live()
    with pytest.raises(SystemExit, match="3"):
        models_command.main(["list", "--target", guarded.target])
    assert capsys.readouterr().err.startswith("error: the server asks for a valid token, see --token-file: expected")


def test_health_needs_no_token(guarded: Served) -> None:
    request = health_pb2.HealthCheckRequest().SerializeToString()
    checked = guarded.channel.unary_unary(HEALTH_CHECK)(request, timeout=60)
    watched = guarded.channel.unary_stream(HEALTH_WATCH)(request, timeout=60)
    assert checked == next(watched) == health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
    watched.cancel()
