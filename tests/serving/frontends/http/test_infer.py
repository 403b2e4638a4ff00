"""Inference over HTTP: from tritonclient, from plain JSON clients such as curl, and with malformed requests."""

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from serving.frontends.http import HttpFrontend
from serving.protocol.tensors import DATATYPES
from tests.serving.fake_repository import PATIENCE_S, BlockingBackend, FakeRepository, backend_of
from tests.serving.frontends.callers import wait_until
from tests.serving.frontends.http.conftest import MAX_BODY

ROWS = np.array([[1, 2, 3], [4, 5, 6.5]], np.float32)
PATH = "/v2/models/twice/infer"


@pytest.fixture(scope="module")
def triton(address: str) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(address, network_timeout=60) as client:
        yield client


@pytest.fixture
def held(repository: FakeRepository) -> Iterator[BlockingBackend]:
    """The newest version of `twice`, held until the test (or its end) sets `free`."""
    backend = backend_of(repository.get("twice"))
    while backend.began.acquire(blocking=False):
        pass
    backend.free.clear()
    yield backend
    backend.free.set()


def given(name: str, array: np.ndarray[Any, Any], datatype: str, *, binary: bool = True) -> Any:
    tensor = tritonclient.http.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def json_request(rows: Any = ROWS, **more: Any) -> dict[str, Any]:
    rows = np.asarray(rows)
    tensor = {"name": "numbers", "shape": list(rows.shape), "datatype": "FP32", "data": rows.tolist()}
    return {"inputs": [tensor], **more}


def binary_request(message: dict[str, Any], tail: bytes) -> tuple[bytes, dict[str, str]]:
    head = json.dumps(message).encode()
    return head + tail, {"Inference-Header-Content-Length": str(len(head))}


class TestTritonClient:
    @pytest.mark.parametrize("binary_in", [True, False])
    @pytest.mark.parametrize("binary_out", [True, False])
    def test_each_form_in_each_direction(
        self, triton: tritonclient.http.InferenceServerClient, binary_in: bool, binary_out: bool
    ) -> None:
        wanted = [tritonclient.http.InferRequestedOutput(name, binary_data=binary_out) for name in ("sum", "twice")]
        response = triton.infer(
            "twice", [given("numbers", ROWS, "FP32", binary=binary_in)], outputs=wanted, request_id="a7"
        )
        np.testing.assert_array_equal(response.as_numpy("twice"), 2 * ROWS)
        np.testing.assert_array_equal(response.as_numpy("sum"), ROWS.sum(axis=1, keepdims=True))
        message = response.get_response()
        assert (message["model_name"], message["model_version"], message["id"]) == ("twice", "3", "a7")
        assert [output["name"] for output in message["outputs"]] == ["sum", "twice"]

    def test_all_outputs_binary_where_none_is_named(self, triton: tritonclient.http.InferenceServerClient) -> None:
        response = triton.infer("twice", [given("numbers", ROWS, "FP32")], model_version="1")
        message = response.get_response()
        assert [output["parameters"] for output in message["outputs"]] == [
            {"binary_data_size": 24},
            {"binary_data_size": 8},
        ]
        assert "id" not in message
        assert message["model_version"] == "1"

    @pytest.mark.parametrize("binary", [True, False])
    def test_classification(self, triton: tritonclient.http.InferenceServerClient, binary: bool) -> None:
        wanted = [tritonclient.http.InferRequestedOutput("twice", binary_data=binary, class_count=2)]
        response = triton.infer("twice", [given("numbers", ROWS, "FP32")], outputs=wanted)
        classes = [[str(entry, "utf-8") if binary else entry for entry in row] for row in response.as_numpy("twice")]
        assert classes == [["6.000000:2:three", "4.000000:1:two"], ["13.000000:2:three", "10.000000:1:two"]]

    @pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT8", "INT64", "UINT64", "FP16", "FP32", "FP64"])
    def test_each_data_type(self, triton: tritonclient.http.InferenceServerClient, datatype: str) -> None:
        array = np.array([[0, 1], [1, 3]]).astype(DATATYPES[datatype].dtype)
        for binary in (True, False) if datatype != "FP16" else (True,):
            wanted = [tritonclient.http.InferRequestedOutput("y", binary_data=binary)]
            response = triton.infer(f"echo_{datatype}", [given("x", array, datatype, binary=binary)], outputs=wanted)
            np.testing.assert_array_equal(response.as_numpy("y"), array)
            assert response.as_numpy("y").dtype == array.dtype

    @pytest.mark.parametrize("binary", [True, False])
    def test_strings(self, triton: tritonclient.http.InferenceServerClient, binary: bool) -> None:
        array = np.array([["é".encode(), b""], [b"a", b"bc"]], object)
        wanted = [tritonclient.http.InferRequestedOutput("y", binary_data=binary)]
        response = triton.infer("echo_BYTES", [given("x", array, "BYTES", binary=binary)], outputs=wanted)
        strings = [entry if binary else entry.encode() for entry in response.as_numpy("y").ravel()]
        assert strings == array.ravel().tolist()

    def test_several_inputs_in_another_order_without_a_batch_dimension(
        self, triton: tritonclient.http.InferenceServerClient
    ) -> None:
        a, b = np.arange(5), 10 * np.arange(5)
        inputs = [given("b", b, "INT64"), given("a", a, "INT64", binary=False)]
        np.testing.assert_array_equal(triton.infer("add", inputs).as_numpy("c"), a + b)

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_compressed_requests(self, triton: tritonclient.http.InferenceServerClient, algorithm: str) -> None:
        response = triton.infer("twice", [given("numbers", ROWS, "FP32")], request_compression_algorithm=algorithm)
        np.testing.assert_array_equal(response.as_numpy("twice"), 2 * ROWS)

    def test_many_at_once(self, address: str) -> None:
        async def ask() -> list[float]:
            async with tritonclient.http.aio.InferenceServerClient(address, conn_limit=20) as client:
                rows = [np.full((1, 3), number, np.float32) for number in range(100)]
                responses = await asyncio.gather(
                    *(client.infer("twice", [given("numbers", row, "FP32")]) for row in rows)
                )
                return [float(response.as_numpy("sum")[0, 0]) for response in responses]

        assert asyncio.run(ask()) == [3.0 * number for number in range(100)]

    def test_an_error_is_one_sentence(self, triton: tritonclient.http.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="'nothing' is not found") as raised:
            triton.infer("nothing", [given("numbers", ROWS, "FP32")])
        assert raised.value.status() == "404"


def test_plain_json(http: httpx.Client) -> None:
    response = http.post(PATH, json=json_request([[1, 2, 3.5]], id="mine"))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "model_name": "twice",
        "model_version": "3",
        "id": "mine",
        "outputs": [
            {"name": "twice", "datatype": "FP32", "shape": [1, 3], "data": [2, 4, 7]},
            {"name": "sum", "datatype": "FP32", "shape": [1, 1], "data": [6.5]},
        ],
    }


def test_a_body_in_many_pieces(http: httpx.Client) -> None:
    rows = np.ones((8, 3))
    body = json.dumps(json_request(rows)).encode()
    pieces = [bytes([byte]) for byte in body]
    assert http.post(PATH, content=iter(pieces)).json()["outputs"][1]["data"] == [3.0] * 8


LARGE = b" " * (MAX_BODY + 1)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"inputs": [json_request()["inputs"][0] | changes]}


BAD: dict[str, tuple[str, Any, dict[str, str], int, str]] = {
    "no body": (PATH, b"", {}, 400, "the request is not JSON"),
    "no JSON": (PATH, b"{", {}, 400, "the request is not JSON"),
    "deep JSON": (PATH, b'{"x":' + b"[" * 90_000, {}, 400, "the request is not JSON"),
    "another type": (PATH, [], {}, 400, "Expected `object`, got `array`"),
    "ragged": (PATH, tensor(data=[[1, 2, 3], [4, 5]]), {}, 400, "ragged"),
    "too few elements": (PATH, tensor(data=[1, 2, 3]), {}, 400, "expected 6 elements for shape [2, 3], got 3"),
    "huge shape": (PATH, tensor(shape=[2**40, 3]), {}, 400, "expected 3298534883328 elements"),
    "huge shape, batch": (PATH, tensor(shape=[2**62, 2**62]), {}, 400, "has more elements than"),
    "wrong data type": (PATH, tensor(datatype="INT64", data=[1] * 6), {}, 400, "but the model expects 'FP32'"),
    "wrong rank": (PATH, tensor(shape=[6]), {}, 400, "unexpected shape, expected [-1, 3], got [6]"),
    "wrong name": (PATH, tensor(name="x"), {}, 400, "has no input 'x': it expects 'numbers'"),
    "no rows": (PATH, tensor(shape=[0, 3], data=[]), {}, 400, "batch-size must be between 1 and 8"),
    "too many rows": (PATH, tensor(shape=[9, 3], data=[0] * 27), {}, 400, "between 1 and 8 for model 'twice', got 9"),
    "unknown output": (PATH, json_request(outputs=[{"name": "z"}]), {}, 400, "unexpected inference output 'z'"),
    "shared memory": (
        PATH,
        json_request(outputs=[{"name": "sum", "parameters": {"shared_memory_region": "r"}}]),
        {},
        501,
        "shared memory",
    ),
    "bad timeout": (PATH, json_request(parameters={"timeout": -1}), {}, 400, "'timeout' must be a whole number"),
    "FP16 in JSON": (
        "/v2/models/echo_FP16/infer",
        {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP16", "data": [1, 2]}]},
        {},
        400,
        "FP16 is only accepted as binary data",
    ),
    "bytes that do not fit": (
        PATH,
        *binary_request(tensor(parameters={"binary_data_size": 4}), b"1234"),
        400,
        "both data and a binary_data_size",
    ),
    "header that is no number": (
        PATH,
        json_request(),
        {"Inference-Header-Content-Length": "-1"},
        400,
        "must be a whole number of bytes, got '-1'",
    ),
    "header beyond the body": (
        PATH,
        json_request(),
        {"Inference-Header-Content-Length": "100000"},
        400,
        "said to have 100000 bytes",
    ),
    "unknown model": ("/v2/models/nothing/infer", json_request(), {}, 404, "unknown model: 'nothing'"),
    "unknown model, no JSON": ("/v2/models/nothing/infer", b"{", {}, 404, "unknown model: 'nothing'"),
    "a name that leaves the folder": ("/v2/models/%2e%2e/infer", json_request(), {}, 404, "'..' is not found"),
    "unknown version": ("/v2/models/twice/versions/2/infer", json_request(), {}, 404, "version 2 is not found"),
    "unknown encoding": (PATH, json_request(), {"Content-Encoding": "br"}, 415, "'br' is not supported"),
    "no gzip": (PATH, json_request(), {"Content-Encoding": "gzip"}, 400, "cannot be decompressed"),
    "two encodings": (PATH, json_request(), {"Content-Encoding": "gzip, deflate"}, 415, "'gzip, deflate' is not supp"),
    "half a gzip": (PATH, gzip.compress(b"{}" * 99)[:-9], {"Content-Encoding": "gzip"}, 400, "is cut off"),
    "two gzips": (PATH, gzip.compress(b"{}") * 2, {"Content-Encoding": "gzip"}, 400, "data after its end"),
    "a bomb": (PATH, zlib.compress(b" " * 10**8, 9), {"Content-Encoding": "deflate"}, 413, "when decompressed"),
    "too large": (PATH, LARGE, {}, 413, f"of {len(LARGE)} bytes is too large: at most {MAX_BODY} bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_explained_and_does_not_affect_others(case: str, http: httpx.Client) -> None:
    path, content, headers, status, sentence = BAD[case]
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    response = http.post(path, content=body, headers=headers)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert sentence in response.json()["error"]
    assert "\n" not in response.json()["error"]
    assert http.post(PATH, json=json_request([[1, 2, 3]])).json()["outputs"][1]["data"] == [6]


def test_binary_data_of_the_wrong_size(http: httpx.Client) -> None:
    message = {"name": "numbers", "shape": [1, 3], "datatype": "FP32"}
    for declared, sent, sentence in (
        (12, 11, "expected 12 bytes after the JSON, the sum of all binary_data_size, got 11"),
        (11, 11, "expected 12 bytes for FP32 of shape [1, 3], got 11"),
        (-1, 11, "must be a whole number from 0, got -1"),
    ):
        tensor = message | {"parameters": {"binary_data_size": declared}}
        body, headers = binary_request({"inputs": [tensor]}, bytes(sent))
        response = http.post(PATH, content=body, headers=headers)
        assert response.status_code == 400
        assert sentence in response.json()["error"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(http: httpx.Client) -> None:
    sent = 0

    def pour() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(40):
            sent += MAX_BODY // 16
            yield LARGE[: MAX_BODY // 16]

    response = http.post(PATH, content=pour())
    assert response.status_code == 413
    assert "so far is too large" in response.json()["error"]
    assert http.post(PATH, json=json_request()).status_code == 200


def test_a_large_body_is_refused_before_it_arrives(server: HttpFrontend) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def in_background(http: httpx.Client, pool: ThreadPoolExecutor, **more: Any) -> Any:
    return pool.submit(http.post, PATH, json=json_request([[1, 2, 3]], **more))


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(
    http: httpx.Client, repository: FakeRepository, held: BlockingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = repository.get("twice").batcher
    monkeypatch.setattr("serving.inference.request_queue.MAX_QUEUED_BYTES", 0)
    with ThreadPoolExecutor(3) as pool:
        first = in_background(http, pool)
        assert held.began.acquire(timeout=PATIENCE_S)
        second = in_background(http, pool)
        wait_until(lambda: batcher.num_queued == 1)
        refused = http.post(PATH, json=json_request())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "the queue of model 'twice' is full" in refused.json()["error"]
        held.free.set()
        assert first.result().status_code == second.result().status_code == 200


def test_a_request_past_its_timeout_fails_at_once_and_never_runs(
    http: httpx.Client, repository: FakeRepository, held: BlockingBackend
) -> None:
    ran = len(held.batches)
    with ThreadPoolExecutor(1) as pool:
        first = in_background(http, pool)
        assert held.began.acquire(timeout=PATIENCE_S)
        late = http.post(PATH, json=json_request(parameters={"timeout": 20_000}))
        assert late.status_code == 504
        assert "within the timeout of 20000 microseconds" in late.json()["error"]
        held.free.set()
        assert first.result().status_code == 200
    assert http.post(PATH, json=json_request([[1, 2, 3]], parameters={"timeout": 10**9})).status_code == 200
    assert held.batches[ran:] == [1, 1]


def test_a_disconnected_client_is_removed_from_the_queue(
    http: httpx.Client, server: HttpFrontend, repository: FakeRepository, held: BlockingBackend
) -> None:
    model = repository.get("twice")
    cancelled = model.statistics.snapshot().failures["CANCELED"]
    ran = len(held.batches)
    body = json.dumps(json_request()).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with ThreadPoolExecutor(1) as pool:
        first = in_background(http, pool)
        assert held.began.acquire(timeout=PATIENCE_S)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            wait_until(lambda: model.batcher.num_queued == 1)
        wait_until(lambda: model.batcher.num_queued == 0)
        held.free.set()
        assert first.result().status_code == 200
    assert model.statistics.snapshot().failures["CANCELED"] == cancelled + 1
    assert held.batches[ran:] == [1]


def test_a_disconnect_within_the_body_leaves_nothing_behind(
    http: httpx.Client, server: HttpFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"{")
    assert http.post(PATH, json=json_request()).status_code == 200
    assert caplog.messages == []


def test_a_failing_model_is_a_server_error_of_that_request_only(
    http: httpx.Client, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(numbers: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(backend_of(repository.get("twice", "1")), "function", fail)
    response = http.post("/v2/models/twice/versions/1/infer", json=json_request())
    assert response.status_code == 500
    assert response.json() == {"error": "model 'twice' failed: no luck"}
    assert http.post(PATH, json=json_request()).status_code == 200


def test_an_unexpected_exception_is_reported_without_details(
    http: httpx.Client, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(repository, "get", fail)
    response = http.post(PATH, json=json_request())
    assert response.status_code == 500
    assert "secret" not in response.text
    wait_until(lambda: "ZeroDivisionError" in caplog.text)  # logged after the response
