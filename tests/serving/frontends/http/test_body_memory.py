"""Large bodies share one memory: while it is full, they are refused, and slow ones give their place."""

import gzip
import re
import socket
from collections.abc import Iterator

import httpx
import pytest

from serving.frontends.common.services import Services
from serving.frontends.http import HttpFrontend, body_memory
from serving.inference.message_memory import UNCOUNTED_BYTES
from tests.serving.fake_repository import PATIENCE_S, backend_of
from tests.serving.frontends.callers import wait_until
from tests.serving.frontends.http.conftest import Start
from tests.serving.frontends.http.test_fast_path import connect
from tests.serving.frontends.http.test_protocol import exchange

ROOM = 400_000
POST = b"POST /v2/models/twice/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
SMALL = b'{"inputs":[{"name":"numbers","shape":[1,3],"datatype":"FP32","data":[1,2,3]}]}'
LARGE = SMALL.ljust(300_000)


@pytest.fixture
def services(own_services: Services) -> Services:
    own_services.inference.message_memory.max_bytes = ROOM
    return own_services


@pytest.fixture
def server(start: Start) -> HttpFrontend:
    return start()


def post(body: bytes, headers: bytes = b"") -> bytes:
    return POST % len(body) + headers + b"\r\n" + body


@pytest.fixture
def slow(server: HttpFrontend, services: Services) -> Iterator[socket.socket]:
    """A connection whose body is half there."""
    with connect(server) as connection:
        connection.sendall(post(LARGE)[:-100_000])
        wait_until(lambda: services.inference.message_memory.num_bytes > 150_000)
        yield connection


def test_a_large_body_is_refused_while_others_fill_the_memory(
    server: HttpFrontend, services: Services, slow: socket.socket
) -> None:
    with connect(server) as connection:
        status, headers, body = exchange(connection, post(LARGE))
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert body.startswith(b'{"error":"requests fill the ')
        assert exchange(connection, post(SMALL))[0] == 200  # as long as it is small
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics").text
    assert re.search(r"^convoy_message_bytes [1-9]", text, re.MULTILINE)
    assert f"convoy_message_limit_bytes {ROOM:.1f}" in text
    slow.sendall(LARGE[-100_000:])
    assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: services.inference.message_memory.num_bytes == 0)


def test_the_oldest_slow_body_gives_its_place(
    server: HttpFrontend, services: Services, slow: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_memory, "PATIENCE_S", 0.0)
    with connect(server) as connection:
        assert exchange(connection, post(LARGE))[0] == 200
    status, headers, body = exchange(slow, b"")
    assert (status, headers[b"retry-after"]) == (429, b"1")
    assert b"the body took longer than 0 s while requests fill the server's memory" in body
    slow.sendall(LARGE[-100_000:])  # the rest is passed over
    assert exchange(slow, post(SMALL))[0] == 200
    wait_until(lambda: services.inference.message_memory.num_bytes == 0)


def test_a_client_that_leaves_frees_its_share(services: Services, slow: socket.socket) -> None:
    slow.close()
    wait_until(lambda: services.inference.message_memory.num_bytes == 0)


def test_a_request_is_counted_until_its_response_and_with_its_decompressed_size(
    server: HttpFrontend, services: Services
) -> None:
    backend = backend_of(services.admin.repository.get("twice"))
    backend.free.clear()
    packed = gzip.compress(LARGE)
    assert len(packed) < UNCOUNTED_BYTES
    with connect(server) as connection:
        connection.sendall(post(packed, b"Content-Encoding: gzip\r\n"))
        assert backend.began.acquire(timeout=PATIENCE_S)
        assert services.inference.message_memory.num_bytes == len(packed) + len(LARGE)
        with connect(server) as other:
            assert exchange(other, post(packed, b"Content-Encoding: gzip\r\n"))[0] == 429
        backend.free.set()
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: services.inference.message_memory.num_bytes == 0)
