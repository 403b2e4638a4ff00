"""Request heads and trailers are bounded: httptools itself would collect them without end."""

import socket
from collections.abc import Iterator

import httpx
import pytest

from serving.frontends.http import HttpFrontend
from serving.frontends.http.protocol import MAX_HEAD_BYTES
from tests.serving.fake_repository import PATIENCE_S

REQUEST = b"GET /v2 HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def connection(server: HttpFrontend) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        yield connection


@pytest.mark.parametrize(
    "endless",
    [
        (b"GET /", b"y" * 1000),
        (REQUEST + b"x: ", b"y" * 1000),
        (REQUEST, b"x: " + b"y" * 1000 + b"\r\n"),
        (CHUNKED + b"0\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
    ],
    ids=["path", "header", "headers", "trailers"],
)
def test_an_endless_head_is_refused(connection: socket.socket, endless: tuple[bytes, bytes]) -> None:
    start, piece = endless
    connection.sendall(start)
    received, sent = b"", 0
    connection.settimeout(0.001)
    while not received:
        assert sent < 64 << 20, "the server reads on"
        try:
            sent += connection.send(piece)
            received = connection.recv(1000)
        except TimeoutError:
            continue
        except ConnectionError:
            return  # the server closed the connection, and its response was lost to data on the way
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"head is larger than" in received


def test_a_head_within_the_limit_is_served(http: httpx.Client) -> None:
    assert http.get("/v2", headers={"x": "y" * (MAX_HEAD_BYTES - 1000)}).status_code == 200


def test_pipelined_requests_of_any_total_size_are_served(connection: socket.socket) -> None:
    request = REQUEST + b"x: " + b"y" * 1000 + b"\r\n\r\n"
    count = 2 * MAX_HEAD_BYTES // len(request)
    connection.sendall(request * count)
    received = b""
    while received.count(b"HTTP/1.1 200 ") < count:
        received += connection.recv(1 << 16)
        assert b"HTTP/1.1 400 " not in received
