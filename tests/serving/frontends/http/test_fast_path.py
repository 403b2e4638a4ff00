"""Requests that repeat the head of the one before take a fast path, on which nothing else differs."""

import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoy import credentials
from convoy.auth import TokenFile
from serving.errors import InvalidArgument
from serving.frontends.common.auth import SCOPES
from serving.frontends.common.services import Services
from serving.frontends.http import HttpFrontend, fast_path, infer
from serving.frontends.http.fast_path import Exchange
from serving.protocol.json_infer import JsonEncoder
from tests.serving.fake_repository import (
    PATIENCE_S,
    BlockingBackend,
    FakeRepository,
    add_without_batch,
    backend_of,
    echo,
    make_services,
    twice,
)
from tests.serving.frontends.callers import wait_until
from tests.serving.frontends.http.conftest import Start
from tests.serving.frontends.http.test_protocol import exchange

ROW = np.array([[1, 2, 3]], np.float32)


@pytest.fixture
def own_services() -> Iterator[Services]:
    repository = FakeRepository(twice(), add_without_batch(), echo("BYTES"))
    yield make_services(repository)
    repository.close()


@pytest.fixture
def backend(own_services: Services) -> BlockingBackend:
    return backend_of(own_services.admin.repository.get("twice"))


@pytest.fixture
def on_fast_path(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each request that could have taken the fast path took it."""
    taken: list[bool] = []
    start = Exchange.start

    def record(self: Exchange, data: bytes) -> bool:
        taken.append(start(self, data))
        return taken[-1]

    monkeypatch.setattr(Exchange, "start", record)
    return taken


def connect(server: HttpFrontend) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)


def request(
    array: Any = ROW,
    *,
    model: str = "twice",
    name: str = "numbers",
    datatype: str = "FP32",
    more: str = "",
    **rest: Any,
) -> bytes:
    tail = array if isinstance(array, bytes) else array.tobytes()
    shape = rest.pop("shape", None) or list(array.shape)
    tensor = {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(tail)}}
    header = json.dumps({"inputs": [tensor], **rest}).encode()
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\n{more}",
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + len(tail)}\r\n\r\n",
    ]
    return "".join(lines).encode() + header + tail


def sums(body: bytes) -> list[float]:
    found: list[float] = json.loads(body)["outputs"][1]["data"]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "sum"}, {"name": "twice", "parameters": {"binary_data": True}}]},
        {"outputs": [{"name": "twice", "parameters": {"classification": 2}}]},
        {"id": "mine"},
        {"id": "é\ud800"},
    ],
)
def test_responses_are_those_of_the_long_way(start: Start, on_fast_path: list[bool], options: dict[str, Any]) -> None:
    with connect(start()) as connection:
        first, *others = [exchange(connection, request(**options)) for _ in range(3)]
        assert exchange(connection, request(4 * ROW, **options))[0] == 200
    assert first[0] == 200
    for status, headers, body in others:
        assert (status, body) == (200, first[2])
        assert headers.keys() == first[1].keys()
    assert on_fast_path == [True, True, True]


def test_strings_and_models_without_a_batch(start: Start, on_fast_path: list[bool]) -> None:
    strings = b"\x01\x00\x00\x00a\x02\x00\x00\x00bc"
    with connect(start()) as connection:
        for _ in range(3):
            _, _, body = exchange(
                connection, request(strings, model="echo_BYTES", name="x", datatype="BYTES", shape=[1, 2])
            )
            assert json.loads(body)["outputs"][0]["data"] == ["a", "bc"]
    assert on_fast_path == [True, True]


def test_each_request_has_its_own_data(start: Start, on_fast_path: list[bool]) -> None:
    with connect(start()) as one, connect(start()) as other:
        for number in range(10):
            assert sums(exchange(one, request(number * ROW))[2]) == [6 * number]
            assert sums(exchange(other, request(-number * ROW))[2]) == [-6 * number]
    assert on_fast_path == [True] * 18


def test_other_heads_take_the_slow_path(start: Start, on_fast_path: list[bool]) -> None:
    with connect(start()) as connection:
        for number in range(3):
            assert exchange(connection, request(more=f"X-Request-Id: {number}\r\n"))[0] == 200
        for more in ("Origin: http://a\r\n", "Expect: x\r\n", "Content-Encoding: identity\r\n"):
            for _ in range(4):
                assert exchange(connection, request(more=more))[0] == 200
        two = np.concatenate([ROW, ROW])
        assert sums(exchange(connection, request(two))[2]) == [6, 6]
    assert on_fast_path == [False] * 3, "each of the heads that repeat is looked at once"


def test_pieces_and_several_requests_in_one_piece(start: Start, on_fast_path: list[bool]) -> None:
    with connect(start()) as connection:
        whole = request()
        assert exchange(connection, whole)[0] == 200
        connection.sendall(whole[:-3])
        connection.sendall(whole[-3:])
        connection.sendall(whole + request(2 * ROW) + whole)
        connection.sendall(whole)
        received = b""
        while received.count(b"HTTP/1.1 200 ") < 5 or not received.endswith(b"]}"):
            received += connection.recv(1 << 16)
        assert [text.count(b'"data":[12.0]') for text in received.split(b"HTTP/1.1 200 ")[1:]] == [0, 0, 1, 0, 0]
        assert [exchange(connection, whole)[0] for _ in range(2)] == [200, 200]
    assert on_fast_path[-1:] == [True]


def test_a_request_waits_for_the_one_before(start: Start, backend: BlockingBackend, on_fast_path: list[bool]) -> None:
    with connect(start()) as connection:
        assert exchange(connection, request())[0] == 200
        assert backend.began.acquire(timeout=PATIENCE_S)
        backend.free.clear()
        connection.sendall(request(2 * ROW))
        assert backend.began.acquire(timeout=PATIENCE_S)
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        backend.free.set()
        received = b""
        while b"convoy" not in received:
            received += connection.recv(1 << 16)
        assert received.index(b'"data":[12.0]') < received.index(b"convoy")
    assert on_fast_path == [True]


def test_wrong_data_is_explained(start: Start, on_fast_path: list[bool]) -> None:
    with connect(start()) as connection:
        whole = request()
        assert exchange(connection, whole)[0] == 200
        status, _, body = exchange(connection, whole.replace(b"[1, 3]", b"[2, 3]"))
        assert (status, b"expected 24 bytes for FP32 of shape [2, 3], got 12" in body) == (400, True)
        assert exchange(connection, whole)[0] == 200
    assert on_fast_path == [False, True]


def test_errors_of_the_model_and_of_a_full_queue(
    start: Start,
    backend: BlockingBackend,
    on_fast_path: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start()
    with connect(server) as one, connect(server) as other, connect(server) as third:
        for connection in (one, other, third):
            assert exchange(connection, request())[0] == 200
            assert backend.began.acquire(timeout=PATIENCE_S)
        monkeypatch.setattr("serving.inference.request_queue.MAX_QUEUED_BYTES", 0)
        backend.free.clear()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(exchange, one, request())
            assert backend.began.acquire(timeout=PATIENCE_S)
            second = pool.submit(exchange, other, request())
            wait_until(lambda: len(on_fast_path) == 2)
            status, headers, body = exchange(third, request())
            assert (status, headers[b"retry-after"], b"is full" in body) == (429, b"1", True)
            backend.free.set()
            assert first.result()[0] == second.result()[0] == 200
        function, backend.function = backend.function, lambda numbers: []
        assert exchange(one, request())[0] == 500
        backend.function = function
        assert exchange(one, request())[0] == 200
    assert on_fast_path == [True] * 5


def test_a_disconnected_client_is_removed_from_the_queue(
    start: Start, own_services: Services, backend: BlockingBackend, on_fast_path: list[bool]
) -> None:
    server = start()
    batcher = own_services.admin.repository.get("twice").batcher
    with connect(server) as one:
        with connect(server) as other:
            for connection in (one, other):
                assert exchange(connection, request())[0] == 200
                assert backend.began.acquire(timeout=PATIENCE_S)
            backend.free.clear()
            one.sendall(request())
            assert backend.began.acquire(timeout=PATIENCE_S)
            other.sendall(request())
            wait_until(lambda: batcher.num_queued == 1)
        wait_until(lambda: batcher.num_queued == 0)
        backend.free.set()
        assert one.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert on_fast_path == [True, True]


def test_another_version_is_used_at_once(start: Start, own_services: Services, on_fast_path: list[bool]) -> None:
    repository: Any = own_services.admin.repository
    with connect(start()) as connection:
        for version in ("1", "2", "3"):
            if version != "1":
                repository.replace(twice(version=version))
            for _ in range(2):
                assert json.loads(exchange(connection, request())[2])["model_version"] == version
    assert on_fast_path == [True, False, True, False, True]


@pytest.mark.parametrize("num_before", [0, 2], ids=["the slow path", "the fast path"])
@pytest.mark.parametrize("error", [MemoryError(), InvalidArgument("no")])
def test_a_response_that_cannot_be_rendered_is_answered_and_counted(
    start: Start,
    own_services: Services,
    on_fast_path: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    num_before: int,
    error: Exception,
) -> None:
    status, reason = (400, "invalid_argument") if isinstance(error, InvalidArgument) else (500, "internal")

    def fail(*arguments: Any) -> None:
        raise error

    server = start()
    for _place in ("on the event loop", "on the executor"):
        with connect(server) as connection:
            assert [exchange(connection, request())[0] for _ in range(num_before)] == [200] * num_before
            with monkeypatch.context() as patch:
                patch.setattr(JsonEncoder, "render", fail)
                assert exchange(connection, request())[0] == status
        monkeypatch.setattr(fast_path, "MAX_INLINE_OUTPUT_BYTES", -1)
        monkeypatch.setattr(infer, "MAX_INLINE_OUTPUT_BYTES", -1)
    assert own_services.inference.refusals.snapshot() == {(reason, "twice"): 2}


class TestTokens:
    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(credentials, "CHECK_INTERVAL_S", 0.0)
        path = tmp_path / "tokens"
        path.write_text("secret name=a scopes=infer\nfew name=b scopes=infer requests_per_second=1\n")
        path.chmod(0o600)
        return path

    def test_they_are_checked_each_time(
        self, start: Start, on_fast_path: list[bool], path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "serving.access")
        server = start(tokens=TokenFile(path, SCOPES), access_log=True)
        whole = request(more="Authorization: Bearer secret\r\n")
        with connect(server) as connection:
            assert [exchange(connection, whole)[0] for _ in range(3)] == [200, 200, 200]
            path.write_text("other name=a scopes=infer\n")
            assert exchange(connection, whole)[0] == 401
        wait_until(lambda: len(caplog.records) >= 4)
        fields: Any = [record.__dict__["fields"] for record in caplog.records]
        assert [(line["method"], line["status"], line.get("principal")) for line in fields] == [
            *[("POST /v2/models/twice/infer", "200", "a")] * 3,
            ("POST /v2/models/twice/infer", "401", None),
        ]
        assert on_fast_path == [True, True, False]

    def test_quotas_hold(self, start: Start, on_fast_path: list[bool], path: Path) -> None:
        whole = request(more="Authorization: Bearer few\r\n")
        with connect(start(tokens=TokenFile(path, SCOPES))) as connection:
            assert {exchange(connection, whole)[0] for _ in range(5)} == {200, 429}
        assert not any(on_fast_path)


class TestStop:
    def test_connections_end_while_the_server_drains(self, start: Start, own_services: Services) -> None:
        with connect(start()) as connection:
            assert exchange(connection, request())[0] == 200
            own_services.admin.health.drain()
            status, headers, _ = exchange(connection, request())
            assert (status, headers[b"connection"]) == (200, b"close")

    @pytest.mark.parametrize(("grace_s", "status"), [(PATIENCE_S, 200), (0, 503)])
    def test_a_request_in_flight(self, start: Start, backend: BlockingBackend, grace_s: int, status: int) -> None:
        server = start()
        with connect(server) as connection, ThreadPoolExecutor(1) as pool:
            assert exchange(connection, request())[0] == 200
            assert backend.began.acquire(timeout=PATIENCE_S)
            backend.free.clear()
            connection.sendall(request())
            assert backend.began.acquire(timeout=PATIENCE_S)
            stopping = pool.submit(server.stop, grace_s)
            if status == 200:
                wait_until(lambda: server._api_server._server is not None and server._api_server._server.should_exit)
                backend.free.set()
            assert connection.recv(1000).startswith(b"HTTP/1.1 %d " % status)
            assert connection.recv(1000) == b""
            backend.free.set()
            stopping.result(timeout=PATIENCE_S)
