"""What each token permits, on every front end: scopes, rotation, deletion, and quotas."""

import contextlib
import gzip
import json
import queue
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from convoy import credentials
from protos import grpc_service_pb2 as pb
from serving.client import Client, ClientError
from serving.config import ServeConfig
from serving.protocol.methods import INFER, STREAM_INFER
from serving.server import build_server
from tests.serving.conftest import SERVICE, Served, serve

TOKENS = """
# One line each.
everything
alices name=alice scopes=infer
alices-next name=alice scopes=infer
bobs name=bob scopes=admin
prometheus name=prometheus scopes=metrics
few-requests name=few-requests scopes=infer requests_per_second=2
few-bytes name=few-bytes scopes=infer,admin bytes_per_second=100
"""
X = np.ones((1, 4), np.float32)
WAIT_S = 30.0


@dataclass(frozen=True)
class Guarded:
    served: Served
    tokens: Path

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.served.server.http.port}"

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.served.server.http.metrics_port}"

    def rewrite(self, content: str) -> None:
        self.tokens.with_name("new").write_text(content)
        self.tokens.with_name("new").replace(self.tokens)


@pytest.fixture(scope="module", params=["native", "grpcio"])
def guarded(
    request: pytest.FixtureRequest, model_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    path = tmp_path_factory.mktemp("secrets") / "tokens"
    path.write_text(TOKENS)
    config = ServeConfig(
        model_repository=model_repository,
        model_control_mode="explicit",
        load_model=("rows",),
        token_file=path,
        transport=request.param,
        grpc_port=0,
        http_port=0,
        metrics_port=0,
        device="cpu",
        num_threads=1,
        access_log=True,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(credentials, "CHECK_INTERVAL_S", 0.0)
        for served in serve(config):
            yield Guarded(served, path)


@pytest.fixture(autouse=True)
def _restored(guarded: Guarded) -> Iterator[None]:
    yield
    guarded.rewrite(TOKENS)


def infer_request() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="rows", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)
    return request


def call(guarded: Guarded, path: str, token: str, payload: bytes = b"") -> grpc.Call:
    """Returns a finished gRPC call."""
    metadata = [("authorization", f"Bearer {token}")]
    if path == STREAM_INFER:
        stream = guarded.served.channel.stream_stream(path)(iter([payload]), timeout=WAIT_S, metadata=metadata)
        with contextlib.suppress(grpc.RpcError):
            list(stream)
        return stream
    return guarded.served.channel.unary_unary(path).future(payload, timeout=WAIT_S, metadata=metadata)


def grpc_status(guarded: Guarded, path: str, token: str, payload: bytes = b"") -> str:
    name: str = call(guarded, path, token, payload).code().name
    return name


def http_call(guarded: Guarded, method: str, path: str, token: str, **options: Any) -> httpx.Response:
    return httpx.request(
        method, guarded.http + path, headers={"Authorization": f"Bearer {token}"}, timeout=WAIT_S, **options
    )


INFER_JSON = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}

INFERS = ("alices", "alices-next", "everything")
CHANGES = ("bobs", "everything")
READS = (*INFERS, "bobs")
ALL = ("everything", "alices", "alices-next", "bobs", "prometheus")


@pytest.mark.parametrize(
    ("method", "permitted", "answer"),
    [
        ("ModelInfer", INFERS, "OK"),
        ("ModelStreamInfer", INFERS, "OK"),
        ("ServerLive", READS, "OK"),
        ("ServerReady", READS, "OK"),
        ("ServerMetadata", READS, "OK"),
        ("ModelStatistics", READS, "OK"),
        ("RepositoryIndex", READS, "OK"),
        ("RepositoryModelLoad", CHANGES, "OK"),
        ("RepositoryModelUnload", CHANGES, "NOT_FOUND"),
        ("TraceSetting", CHANGES, "UNIMPLEMENTED"),
        ("LogSettings", CHANGES, "UNIMPLEMENTED"),
        ("SystemSharedMemoryRegister", CHANGES, "UNIMPLEMENTED"),
        ("SystemSharedMemoryStatus", READS, "UNIMPLEMENTED"),
    ],
)
def test_scopes_of_grpc(guarded: Guarded, method: str, permitted: tuple[str, ...], answer: str) -> None:
    payloads = {
        "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="rows"),
        "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="nothing"),
    }
    payload = payloads.get(method, infer_request() if "Infer" in method else pb.ServerLiveRequest())
    for token in ALL:
        found = call(guarded, SERVICE + method, token, payload.SerializeToString())
        if token in permitted:
            assert found.code().name == answer
        else:
            assert found.code().name == "PERMISSION_DENIED"
            assert found.details().startswith(f"{method} needs the scope ")
    assert grpc_status(guarded, SERVICE + method, "wrong", payload.SerializeToString()) == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("method", "path", "body", "permitted", "answer"),
    [
        ("POST", "/v2/models/rows/infer", INFER_JSON, INFERS, 200),
        ("POST", "/v2/models/rows/versions/1/infer", INFER_JSON, INFERS, 200),
        ("POST", "/v2/models/rows/generate", {}, INFERS, 501),
        ("POST", "/v2/models/rows/classify", {}, INFERS, 400),
        ("GET", "/openapi.json", None, READS, 200),
        ("GET", "/v2", None, READS, 200),
        ("GET", "/v2/models/rows", None, READS, 200),
        ("GET", "/v2/models/rows/ready", None, READS, 200),
        ("GET", "/v2/models/rows/config", None, READS, 200),
        ("GET", "/v2/models/stats", None, READS, 200),
        ("POST", "/v2/repository/index", {}, READS, 200),
        ("POST", "/v2/repository/models/rows/load", {}, CHANGES, 200),
        ("POST", "/v2/repository/models/nothing/unload", {}, CHANGES, 404),
        ("POST", "/v2/logging", {}, CHANGES, 501),
        ("GET", "/v2/logging", None, READS, 501),
        ("POST", "/v2/systemsharedmemory/region/x/register", {}, CHANGES, 501),
        ("POST", "/v2/no/such/path", {}, CHANGES, 404),
        ("GET", "/v2/no/such/path", None, READS, 404),
    ],
)
def test_scopes_of_http(
    guarded: Guarded, method: str, path: str, body: object, permitted: tuple[str, ...], answer: int
) -> None:
    for token in ALL:
        response = http_call(guarded, method, path, token, json=body)
        if token in permitted:
            assert response.status_code == answer, response.text
        else:
            assert response.status_code == 403
            assert "needs the scope" in response.json()["error"]
    assert http_call(guarded, method, path, "wrong", json=body).status_code == 401


def test_metrics_need_a_token_once_a_line_has_their_scope(guarded: Guarded) -> None:
    def statuses() -> list[int]:
        headers = [
            {},
            *({"Authorization": f"Bearer {token}"} for token in ("wrong", "alices", "prometheus", "everything")),
        ]
        return [httpx.get(f"{guarded.metrics}/metrics", headers=each, timeout=WAIT_S).status_code for each in headers]

    assert statuses() == [401, 401, 403, 200, 200]
    for probe in ("live", "ready"):
        assert httpx.get(f"{guarded.metrics}/v2/health/{probe}").status_code == 200
    guarded.rewrite("everything\nalices name=alice scopes=infer\n")
    assert statuses() == [200, 200, 200, 200, 200]


def test_refused_inferences_are_in_the_metrics(guarded: Guarded) -> None:
    assert grpc_status(guarded, INFER, "wrong") == "UNAUTHENTICATED"
    assert grpc_status(guarded, INFER, "bobs") == "PERMISSION_DENIED"
    assert http_call(guarded, "POST", "/v2/models/rows/infer", "bobs", json=INFER_JSON).status_code == 403
    text = httpx.get(f"{guarded.metrics}/metrics", headers={"Authorization": "Bearer prometheus"}).text
    lines = [line for line in text.splitlines() if "permission_denied" in line or "unauthenticated" in line]
    assert len(lines) == 2, lines
    assert all(float(line.rpartition(" ")[2]) >= 1 for line in lines)


CALLERS: dict[str, Callable[[Guarded, str], int | str]] = {
    "grpc": lambda guarded, token: grpc_status(guarded, INFER, token, infer_request().SerializeToString()),
    "http": lambda guarded, token: (
        http_call(guarded, "POST", "/v2/models/rows/infer", token, json=INFER_JSON).status_code
    ),
}


@pytest.mark.parametrize("front_end", CALLERS)
def test_rotation_and_deletion(guarded: Guarded, front_end: str) -> None:
    infer = CALLERS[front_end]
    served, refused = ("OK", "UNAUTHENTICATED") if front_end == "grpc" else (200, 401)
    assert [infer(guarded, token) for token in ("alices", "alices-next")] == [served, served]
    guarded.rewrite("alices-next name=alice scopes=infer")
    assert [infer(guarded, token) for token in ("alices", "alices-next")] == [refused, served]
    guarded.tokens.unlink()
    assert [infer(guarded, token) for token in ("alices", "alices-next", "everything")] == [refused] * 3
    guarded.rewrite("alices name=alice scopes=infer")
    assert [infer(guarded, token) for token in ("alices", "alices-next")] == [served, refused]


def test_a_revoked_token_ends_the_service_of_open_streams(guarded: Guarded) -> None:
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    responses = guarded.served.channel.stream_stream(STREAM_INFER, None, pb.ModelStreamInferResponse.FromString)(
        iter(messages.get, None), timeout=WAIT_S, metadata=[("authorization", "Bearer alices")]
    )
    payload = infer_request().SerializeToString()
    messages.put(payload)
    assert next(responses).error_message == ""
    guarded.rewrite("everything")
    messages.put(payload)
    assert next(responses).error_message.startswith("expected metadata 'authorization: Bearer TOKEN'")
    messages.put(None)
    assert list(responses) == []


def test_a_quota_of_requests_is_refused_with_a_hint_and_recovers(guarded: Guarded) -> None:
    payload = infer_request().SerializeToString()
    refused = None
    for _ in range(10):  # 3 at once, then 2 a second
        done = call(guarded, INFER, "few-requests", payload)
        if done.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            refused = done
            break
    assert refused is not None
    assert refused.details().startswith("the quota of 'few-requests' is used up: retry in ")
    hints = [value for key, value in refused.trailing_metadata() if key.endswith("retry-pushback-ms")]
    assert len(hints) == 1
    assert 0 < int(hints[0]) <= 500
    for _ in range(10):  # on a busy machine the quota may have recovered
        response = http_call(guarded, "POST", "/v2/models/rows/infer", "few-requests", json=INFER_JSON)
        if response.status_code != 200:
            break
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert "the quota of 'few-requests' is used up" in response.json()["error"]
    assert grpc_status(guarded, INFER, "alices", payload) == "OK"
    time.sleep(1.05 * 500 / 1000)
    assert grpc_status(guarded, INFER, "few-requests", payload) == "OK"


def test_a_quota_of_bytes_counts_every_front_end(guarded: Guarded) -> None:
    """A message larger than the burst is served, and leaves a debt for all front ends and methods."""
    payload = infer_request().SerializeToString()
    request = infer_request()
    request.id = "x" * 500
    assert grpc_status(guarded, INFER, "few-bytes", request.SerializeToString()) == "OK"
    assert grpc_status(guarded, INFER, "few-bytes", payload) == "RESOURCE_EXHAUSTED"
    assert grpc_status(guarded, SERVICE + "ServerLive", "few-bytes") == "RESOURCE_EXHAUSTED"
    response = http_call(guarded, "GET", "/v2", "few-bytes")
    assert response.status_code == 429
    assert 3 <= int(response.headers["retry-after"]) <= 6
    stream = guarded.served.channel.stream_stream(STREAM_INFER, None, pb.ModelStreamInferResponse.FromString)
    messages = list(stream(iter([payload]), timeout=WAIT_S, metadata=[("authorization", "Bearer few-bytes")]))
    assert [message.error_message.partition(":")[0] for message in messages] == ["the quota of 'few-bytes' is used up"]
    guarded.rewrite(TOKENS.replace("bytes_per_second=100", "bytes_per_second=1k"))  # a new quota is a new bucket
    body = iter([b'{"id": "' + b"x" * 5000 + b'",', b'"inputs": []}'])  # of no declared length
    assert http_call(guarded, "POST", "/v2/models/rows/infer", "few-bytes", content=body).status_code == 400
    assert http_call(guarded, "GET", "/v2", "few-bytes").status_code == 429


def test_a_compressed_body_counts_with_all_its_bytes(guarded: Guarded) -> None:
    guarded.rewrite("own name=own scopes=infer,admin bytes_per_second=10k")
    body = gzip.compress(json.dumps(INFER_JSON | {"id": "x" * 40_000}).encode())
    assert len(body) < 1000
    headers = {"Authorization": "Bearer own", "Content-Encoding": "gzip"}
    url = f"{guarded.http}/v2/models/rows/infer"
    assert httpx.post(url, headers=headers, content=body).status_code == 200
    assert httpx.post(url, headers=headers, content=body).headers["retry-after"] in ("3", "4")
    guarded.rewrite("own name=own scopes=infer,admin bytes_per_second=9k")  # a new quota is a new bucket
    once = gzip.compress(random.Random(0).randbytes(30_000))  # in pieces of no declared length, and hardly smaller
    assert httpx.post(url, headers=headers, content=iter([once])).status_code == 400
    assert httpx.post(url, headers=headers, content=body).headers["retry-after"] in ("2", "3")


def test_our_client_waits_for_its_quota(guarded: Guarded) -> None:
    guarded.rewrite("own name=own scopes=infer requests_per_second=20")
    with Client(guarded.served.target, token="own") as client:
        began = time.monotonic()
        for _ in range(31):
            np.testing.assert_array_equal(client.infer("rows", {"x": X})["echo"], X)
        assert time.monotonic() - began > 0.3
    guarded.rewrite("own name=own scopes=infer requests_per_second=0.01")
    with Client(guarded.served.target, token="own", timeout_s=1) as client:
        client.is_live()
        with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED: the quota of 'own' is used up: retry in"):
            client.is_live()


def test_our_client_names_the_missing_scope(guarded: Guarded) -> None:
    with (
        Client(guarded.served.target, token="bobs") as client,
        pytest.raises(
            ClientError, match="PERMISSION_DENIED: ModelInfer needs the scope infer; the token of 'bob' has admin"
        ),
    ):
        client.infer("rows", {"x": X})


def test_the_access_log_names_the_principal(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "serving.access")
    payload = infer_request().SerializeToString()
    for path, token in (
        (INFER, "alices"),
        (INFER, "bobs"),
        (INFER, "wrong"),
        (STREAM_INFER, "alices"),
        (SERVICE + "ServerLive", "bobs"),
        (SERVICE + "RepositoryModelLoad", "alices"),
    ):
        call(guarded, path, token, payload).code()
    http_call(guarded, "GET", "/v2", "alices")
    http_call(guarded, "POST", "/v2/models/rows/infer", "bobs", json=INFER_JSON)
    expected = {
        ("GET /v2", "200", "alice"),
        ("ModelInfer", "OK", "alice"),
        ("ModelInfer", "PERMISSION_DENIED", "bob"),
        ("ModelInfer", "UNAUTHENTICATED", None),
        ("ModelStreamInfer", "OK", "alice"),
        ("POST /v2/models/rows/infer", "403", "bob"),
        ("RepositoryModelLoad", "PERMISSION_DENIED", "alice"),
        ("ServerLive", "OK", "bob"),
    }
    until = time.monotonic() + WAIT_S
    while not expected <= set(entries(caplog)) and time.monotonic() < until:
        time.sleep(0.01)
    assert set(entries(caplog)) == expected  # a set: the last call of the test before may be logged now
    assert "alices" not in caplog.text


@pytest.mark.parametrize(("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_tokens_over_plain_text_are_warned_of_at_the_start(
    model_repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, warns: bool
) -> None:
    (tmp_path / "tokens").write_text("sesame")
    (tmp_path / "tokens").chmod(0o600)
    config = ServeConfig(
        model_repository=model_repository,
        token_file=tmp_path / "tokens",
        host=host,
        metrics_host="127.0.0.1",
        grpc_port=0,
        http_port=0,
        metrics_port=0,
    )
    server = build_server(config)
    server.start()
    try:
        found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(found) == warns
        assert all(text.startswith("--token-file without TLS on 0.0.0.0: ") and "--tls-cert" in text for text in found)
        with socket.create_connection(("127.0.0.1", server.http.metrics_port)):
            pass
        with pytest.raises(ConnectionRefusedError):  # unlike --host, which may be all addresses
            socket.create_connection(("127.0.0.2", server.http.metrics_port))
    finally:
        server.stop()


def entries(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str | None]]:
    found = [record.__dict__["fields"] for record in caplog.records if record.name == "serving.access"]
    return [(line["method"].removeprefix(SERVICE), line["status"], line.get("principal")) for line in found]
