"""HTTP itself: bounded heads, forms of requests that clients send, and what ends a connection."""

import gzip
import json
import logging
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope

from serving.frontends.http import HttpFrontend
from serving.frontends.http.body import read_body
from serving.frontends.http.executor import BoundedExecutor
from serving.frontends.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED
from tests.serving.fake_repository import PATIENCE_S
from tests.serving.frontends.http.conftest import MAX_BODY

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


def test_requests_beyond_those_that_wait_are_not_read(connection: socket.socket) -> None:
    """13,000 requests in one piece took 9 MB of a connection."""
    connection.sendall((REQUEST + b"\r\n") * (2 * MAX_PIPELINED))
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    assert received.count(b"HTTP/1.1 ") == received.count(b"HTTP/1.1 200 ") == MAX_PIPELINED + 1
    assert received.count(b"connection: close") == 1


def test_what_follows_a_request_and_is_malformed_does_not_take_its_response(connection: socket.socket) -> None:
    """A client that declares too short a body got the error of the rest, and its request was lost."""
    connection.sendall(CHUNKED + b"2\r\n{}\r\n0\r\n\r\n" + REQUEST + b"\r\n" + b'"}\r\n')
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    assert (received.count(b"HTTP/1.1 "), received.count(b"HTTP/1.1 200 ")) == (2, 2)
    assert received.count(b"connection: close") == 1


def test_a_body_that_is_refused_and_then_malformed_has_one_response(connection: socket.socket) -> None:
    piece = b"%x\r\n%s\r\n" % (MAX_BODY, bytes(MAX_BODY))
    assert exchange(connection, CHUNKED + piece + b"2\r\n{}\r\n")[0] == 413
    connection.sendall(b"no size of a chunk\r\n")
    assert connection.recv(1 << 16) == b""


def test_too_many_headers_are_refused(connection: socket.socket) -> None:
    """Empty ones, of which 64 kB took a megabyte for as long as the request."""
    assert exchange(connection, REQUEST + b"a:\r\n" * (MAX_HEADERS - 1) + b"\r\n")[0] == 200
    status, headers, body = exchange(connection, REQUEST + b"a:\r\n" * MAX_HEADERS + b"\r\n")
    assert (status, headers[b"connection"]) == (400, b"close")
    assert json.loads(body) == {"error": f"the request has more than {MAX_HEADERS} headers"}


def test_trailers_are_no_headers(connection: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the headers once the body is there would take a trailer for one."""
    seen: list[bytes] = []

    async def read_and_look(scope: Scope, receive: Receive, max_bytes: int, executor: BoundedExecutor) -> bytes:
        body = await read_body(scope, receive, max_bytes, executor)
        seen.extend(name for name, _ in scope["headers"])
        return body

    monkeypatch.setattr("serving.frontends.http.admin.read_body", read_and_look)
    status, _, _ = exchange(connection, CHUNKED + b"2\r\n{}\r\n0\r\nContent-Encoding: gzip\r\n\r\n")
    assert (status, seen) == (200, [b"host", b"transfer-encoding"])


def test_a_response_that_is_late_for_its_connection_is_no_error(
    connection: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a body is malformed in the same piece as its request, whose handler has not begun."""
    caplog.set_level(logging.WARNING)
    status, headers, _ = exchange(connection, CHUNKED.replace(b"index", b"no/where") + b"2\r\n{}x")
    assert (status, headers[b"connection"]) == (400, b"close")
    assert connection.recv(1) == b""
    assert caplog.records == []


def exchange(connection: socket.socket, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Sends a request. Returns the status, the headers and the body of the response."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(1 << 16)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in lines)
    while len(body) < int(headers[b"content-length"]):
        body += connection.recv(1 << 16)
    return int(status.split()[1]), headers, body


class TestFormsOfRequests:
    def test_spaces_around_the_value_of_a_header_are_no_part_of_it(self, connection: socket.socket) -> None:
        tensor = {"name": "numbers", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
        text = json.dumps({"inputs": [tensor]}).encode()
        length = b"Inference-Header-Content-Length: \t%d \t\r\nContent-Length: %d\r\n\r\n" % (len(text), len(text) + 12)
        request = b"POST /v2/models/twice/infer HTTP/1.1\r\nHost: x\r\n" + length + text + bytes(12)
        assert exchange(connection, request)[0] == 200

    def test_http_1_0_closes_the_connection(self, connection: socket.socket) -> None:
        status, headers, _ = exchange(connection, b"GET /v2 HTTP/1.0\r\n\r\n")
        assert (status, headers[b"connection"]) == (200, b"close")
        assert connection.recv(1) == b""

    def test_http_1_0_keeps_the_connection_where_the_client_asks_for_it(self, connection: socket.socket) -> None:
        for _ in range(2):  # as ApacheBench does
            status, headers, _ = exchange(connection, b"GET /v2 HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
            assert (status, headers[b"connection"]) == (200, b"keep-alive")

    @pytest.mark.parametrize(
        "target",
        [b"http://x/v2", b"http://user@x:8000/v2?a=b", b"/v2/", b"/v2//", b"http://x/v2/", b"/v2?", b"/%76%32"],
    )
    def test_targets_of_the_same_resource(self, connection: socket.socket, target: bytes) -> None:
        status, _, body = exchange(connection, b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)
        assert (status, b"convoy" in body) == (200, True)

    @pytest.mark.parametrize(
        ("target", "status"), [(b"/v2/models/twice%2F", 404), (b"//v2", 404), (b"*", 404), (b"http://x", 400)]
    )
    def test_targets_of_no_resource(self, connection: socket.socket, target: bytes, status: int) -> None:
        assert exchange(connection, b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)[0] == status

    @pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "X-GZIP", "gzip, identity", "identity,gzip"])
    def test_names_of_gzip(self, http: httpx.Client, encoding: str) -> None:
        body = gzip.compress(b'{"ready": true}')
        assert (
            http.post("/v2/repository/index", content=body, headers={"Content-Encoding": encoding}).status_code == 200
        )

    def test_expect(self, connection: socket.socket) -> None:
        head = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert exchange(connection, b"{}")[0] == 200

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            (b"Expect: 100-continue\r\nConnection: keep-alive\r\nContent-Length: 2", b"keep-alive"),
            (b"Connection: keep-alive\r\nTransfer-Encoding: chunked", b"close"),
        ],
    )
    def test_http_1_0(self, connection: socket.socket, headers: bytes, expected: bytes) -> None:
        """It has no status 100; and a proxy of its age, which may not know chunks, keeps no connection with them."""
        body = b"2\r\n{}\r\n0\r\n\r\n" if b"chunked" in headers else b"{}"
        request = b"POST /v2/repository/index HTTP/1.0\r\n%s\r\n\r\n%s" % (headers, body)
        status, answered, _ = exchange(connection, request)
        assert (status, answered[b"connection"]) == (200, expected)

    def test_head_and_options(self, http: httpx.Client) -> None:
        response = http.head("/v2")
        assert (response.status_code, response.content) == (200, b"")
        assert http.options("/v2").status_code == 405
        assert set(http.options("/v2").headers["allow"].split(", ")) == {"GET", "HEAD"}

    @pytest.mark.parametrize(
        "headers",
        [
            b"Content-Length: 2\r\nTransfer-Encoding: chunked",
            b"Content-Length: 2\r\nContent-Length: 2",
            b"Content-Length: 2, 2",
            b"Content-Length: -2",
            b"Content-Length: 99999999999999999999999",
            b"Content-Length : 2",
        ],
    )
    def test_ambiguous_lengths_are_refused(self, connection: socket.socket, headers: bytes) -> None:
        request = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n{}" % headers
        status, answered, body = exchange(connection, request)
        assert (status, answered[b"connection"]) == (400, b"close")
        assert list(json.loads(body)) == ["error"]

    @pytest.mark.parametrize("between", [b", ", b"\r\nTransfer-Encoding: "], ids=["list", "lines"])
    def test_transfer_encodings_other_than_chunked_are_refused(self, connection: socket.socket, between: bytes) -> None:
        lines = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip%schunked\r\n\r\n" % between
        assert exchange(connection, lines + b"0\r\n\r\n")[0] == 501

    def test_an_empty_body(self, http: httpx.Client) -> None:
        assert http.post("/v2/repository/index").status_code == 200
        assert http.post("/v2/models/twice/infer").status_code == 400

    @pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"HTTP/2.0, IRC/6.9"])
    @pytest.mark.parametrize("pieces", [1, 2, 50])
    def test_offers_of_another_protocol_are_ignored(
        self, connection: socket.socket, upgrade: bytes, pieces: int
    ) -> None:
        """Java's HttpClient sends them with the body of its first request."""
        tensor = {"name": "numbers", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
        body = json.dumps({"inputs": [tensor]}).encode()
        lines = [
            b"POST /v2/models/twice/infer HTTP/1.1",
            b"Host: x",
            b"Connection: Upgrade, HTTP2-Settings",
            b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
            b"Upgrade: " + upgrade,
            b"Content-Length: %d" % len(body),
        ]
        request = b"\r\n".join([*lines, b"", b""]) + body + REQUEST + b"\r\n"
        size = -(-len(request) // pieces)
        for start in range(0, len(request), size):
            connection.sendall(request[start : start + size])
            time.sleep(0.002)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 2:
            piece = connection.recv(1 << 16)
            assert piece, received
            received += piece
        assert b'"data":[6.0]' in received
        assert b"binary_tensor_data" in received

    @pytest.mark.parametrize(
        "request_", [b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    )
    def test_what_is_not_http_1_is_refused(self, connection: socket.socket, request_: bytes) -> None:
        status, headers, body = exchange(connection, request_)
        assert (status, headers[b"connection"]) == (400, b"close")
        assert json.loads(body) == {"error": "the request is not HTTP/1.1"}
