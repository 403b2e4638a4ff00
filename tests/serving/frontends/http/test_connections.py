"""Connections have limits of time and number: silent and slow clients do not stay, and do not disturb others."""

import contextlib
import socket
import time

import httpx
import numpy as np
import pytest

from serving.frontends.http import connections
from serving.frontends.http.connections import RateWindow, max_connections
from tests.serving.fake_repository import PATIENCE_S
from tests.serving.frontends.http.conftest import Start

POST = b"POST /v2/models/twice/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
LIMIT_S = 0.3


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short limits of time."""
    monkeypatch.setattr(connections, "SWEEP_S", 0.02)
    for name in ("FIRST_BYTE_S", "HEAD_S", "KEEP_ALIVE_S", "WINDOW_S"):
        monkeypatch.setattr(connections, name, LIMIT_S)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def read_until_closed(connection: socket.socket, piece: bytes = b"") -> tuple[bytes, float]:
    """Sends a piece now and then until the server closes. Returns what it sent, and after which time it closed."""
    began = time.monotonic()
    received = b""
    connection.settimeout(0.02)
    while time.monotonic() - began < PATIENCE_S:
        try:
            found = connection.recv(1 << 16)
            received += found
            if not found:
                return received, time.monotonic() - began
            connection.sendall(piece)
        except TimeoutError:
            with contextlib.suppress(ConnectionError):
                connection.sendall(piece)
        except ConnectionError:
            return received, time.monotonic() - began
    pytest.fail("the server keeps the connection")


@pytest.mark.usefixtures("limits")
class TestSlowClients:
    @pytest.mark.parametrize("port", ["port", "metrics_port"])
    @pytest.mark.parametrize(
        ("sent", "piece", "status"),
        [
            (b"", b"", b""),
            (b"", b"\r\n", b""),
            (b"GET", b"", b"HTTP/1.1 408 "),
            (b"GET /v2 HTTP/1.1\r\nX-a: ", b"a", b"HTTP/1.1 408 "),
            (POST, b"", b"HTTP/1.1 40"),
            (POST + b"a", b"a", b"HTTP/1.1 40"),
            (
                b"POST /v2/models/twice/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"1\r\na\r\n",
                b"HTTP/1.1 40",
            ),
        ],
        ids=["silent", "line breaks", "half a head", "head drip", "no body", "body drip", "chunk drip"],
    )
    def test_are_closed(self, start: Start, port: str, sent: bytes, piece: bytes, status: bytes) -> None:
        with connect(getattr(start(), port)) as connection:
            connection.sendall(sent)
            received, seconds = read_until_closed(connection, piece)
        assert received.startswith(status)
        assert bool(received) == bool(status)
        assert LIMIT_S / 2 < seconds < 20 * LIMIT_S

    def test_an_answered_connection_is_closed_once_it_is_idle(self, start: Start) -> None:
        with connect(start().port) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            received, _ = read_until_closed(connection, b"\r\n")
        assert received.startswith(b"HTTP/1.1 200 ")
        assert received.count(b"HTTP/1.1") == 1

    def test_a_request_refused_early_gets_one_response(self, start: Start) -> None:
        with connect(start().port) as connection:
            connection.sendall(POST.replace(b"900000", b"9000000"))
            received, _ = read_until_closed(connection, b"a")
        assert received.startswith(b"HTTP/1.1 413 ")
        assert received.count(b"HTTP/1.1") == 1

    def test_those_that_leave_a_response_unread_are_closed(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        server = start()
        rows = np.zeros((8, 3)).tolist()
        request = httpx.Request(
            "POST",
            "http://x/v2/models/twice/infer",
            json={
                "inputs": [{"name": "numbers", "shape": [8, 3], "datatype": "FP32", "data": rows}],
                "id": "a" * 500_000,
            },
        )
        head = b"POST /v2/models/twice/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(request.content)
        with connect(server.port) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):
                for _ in range(20):  # more than the kernel's buffers hold
                    connection.sendall(head + request.content)
            api = server._api_server
            until = time.monotonic() + PATIENCE_S
            assert api._server is not None
            while api._server.server_state.connections:
                assert time.monotonic() < until
                time.sleep(0.01)

    def test_a_slow_but_steady_upload_is_served(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections, "MIN_WINDOW_BYTES", 100)
        body = b'{"inputs":[{"name":"numbers","shape":[1,3],"datatype":"FP32","data":[1,2,3]}]}' + b" " * 2000
        with connect(start().port) as connection:
            connection.sendall(POST.replace(b"900000", b"%d" % len(body)))
            for at in range(0, len(body), 100):
                time.sleep(LIMIT_S / 6)
                connection.sendall(body[at : at + 100])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_whole_request_has_a_deadline(start: Start, limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", LIMIT_S)
    monkeypatch.setattr(connections, "MIN_WINDOW_BYTES", 0)
    with connect(start().port) as connection:
        connection.sendall(POST)
        assert read_until_closed(connection, b"a")[0].startswith(b"HTTP/1.1 408 ")


def test_a_rate_window() -> None:
    window = RateWindow()
    window.start(100.0, 5)
    least = connections.MIN_WINDOW_BYTES
    assert not window.is_too_slow(100.0 + connections.WINDOW_S / 2, 5)
    assert not window.is_too_slow(100.0 + connections.WINDOW_S, 5 + least)
    assert not window.is_too_slow(101.0 + connections.WINDOW_S, 5 + least)
    assert window.is_too_slow(100.0 + 2 * connections.WINDOW_S, 4 + 2 * least)


class TestNumber:
    @pytest.mark.parametrize("port", ["port", "metrics_port"])
    def test_waiting_connections_make_room_for_new_ones(
        self, start: Start, monkeypatch: pytest.MonkeyPatch, port: str
    ) -> None:
        monkeypatch.setattr("serving.frontends.http.frontend.max_connections", lambda: 32)
        monkeypatch.setattr("serving.frontends.http.frontend.METRICS_CONNECTIONS", 32)
        number = getattr(start(), port)
        with contextlib.ExitStack() as stack:
            for at in range(100):
                connection = stack.enter_context(connect(number))
                if at % 2:
                    connection.sendall(b"GET /v2 HTTP/1.1\r\nX-")
            assert httpx.get(f"http://127.0.0.1:{number}/v2/health/live").status_code == 200

    def test_a_connection_beyond_the_limit_is_refused_if_all_others_are_busy(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serving.frontends.http.frontend.max_connections", lambda: 0)
        server = start()
        with connect(server.port) as connection:
            received, _ = read_until_closed(connection)
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in received
        metrics = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics").text
        assert 'convoy_refused_requests_total{model="",reason="connections"} 1.0' in metrics

    @pytest.mark.parametrize(("soft", "expected"), [(1024, 512), (1 << 20, 10_000), (-1, 10_000)])
    def test_the_limit_leaves_half_of_the_files(
        self, monkeypatch: pytest.MonkeyPatch, soft: int, expected: int
    ) -> None:
        monkeypatch.setattr("resource.getrlimit", lambda kind: (soft, 1 << 20))
        assert max_connections() == expected
