"""Names in the header Host: a page whose site points its name at this machine reads nothing."""

import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from convoy.auth import TokenFile
from convoy.tls import TlsFiles
from serving.frontends.common.auth import SCOPES
from serving.frontends.http import HttpFrontend
from serving.frontends.http.fast_path import Exchange
from serving.frontends.http.settings import PageSettings
from tests.serving.certificates import Authority, write
from tests.serving.fake_repository import PATIENCE_S
from tests.serving.frontends.http.conftest import ANY_PORT, Start
from tests.serving.frontends.http.test_fast_path import connect, request
from tests.serving.frontends.http.test_protocol import exchange

EVIL = {"host": "evil.example:8000"}


def status(port: int, path: str, headers: dict[str, str], **options: Any) -> int:
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, **options).status_code


def tokens(folder: Path, line: str) -> TokenFile:
    path = folder / "tokens"
    path.write_text(line)
    path.chmod(0o600)
    return TokenFile(path, SCOPES)


def test_both_ports_refuse_a_name_of_another_site_but_tell_their_health(start: Start) -> None:
    server = start(replace(ANY_PORT, page=PageSettings()))
    for path in ("/", "/v2", "/v2/models/twice", "/v2/repository/models", "/openapi.json", "/web/api/live", "/nothing"):
        assert status(server.port, path, EVIL) == 403
    assert status(server.metrics_port, "/metrics", EVIL) == 403
    for port in (server.port, server.metrics_port):
        assert status(port, "/v2/health/live", EVIL) == 200
    said = httpx.get(f"http://127.0.0.1:{server.port}/v2", headers=EVIL).json()["error"]
    assert said == (
        "the host 'evil.example:8000' may be another site's: name it with --cors-origin, or set --token-file"
    )
    refused = [line for line in metrics(server).splitlines() if "refused" in line and "permission" in line.lower()]
    assert refused[0].endswith(" 8.0"), refused


def metrics(server: HttpFrontend) -> str:
    return httpx.get(f"http://localhost:{server.metrics_port}/metrics").text


def test_requests_without_a_name_pass(start: Start) -> None:
    server = start()
    for port, path in ((server.port, "/v2"), (server.metrics_port, "/metrics")):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_two_names_are_refused(start: Start) -> None:
    """One may be checked, and the other taken by a server behind a proxy, or by the fast path of inferences."""
    server = start(replace(ANY_PORT, cors_origins=("*",)))
    for twice in (request(more="host: y\r\n"), b"GET /v2 HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"):
        with connect(server) as connection:
            status, headers, body = exchange(connection, twice)
        assert (status, headers[b"connection"]) == (400, b"close")
        assert body == b'{"error": "the request has more than one Host"}'


def test_pages_that_may_call_name_hosts(start: Start) -> None:
    server = start(replace(ANY_PORT, cors_origins=("https://shop.example",)))
    for port, path in ((server.port, "/v2"), (server.metrics_port, "/metrics")):
        assert status(port, path, {"host": "shop.example"}) == 200
        assert status(port, path, EVIL) == 403
    server = start(replace(ANY_PORT, cors_origins=("*",)))
    assert status(server.port, "/v2", EVIL) == 200


def test_other_addresses_and_tls_check_no_name(start: Start, tmp_path: Path) -> None:
    server = start(replace(ANY_PORT, host="0.0.0.0"))
    assert status(server.port, "/v2", EVIL) == status(server.metrics_port, "/metrics", EVIL) == 200
    server = start(replace(ANY_PORT, metrics_host="0.0.0.0"))
    assert (status(server.port, "/v2", EVIL), status(server.metrics_port, "/metrics", EVIL)) == (403, 200)
    authority = Authority()
    server = start(tls=TlsFiles(*write(tmp_path, authority.issue())))
    trust = ssl.create_default_context(cadata=authority.certificate.decode())
    assert httpx.get(f"https://localhost:{server.port}/v2", headers=EVIL, verify=trust).status_code == 200
    assert status(server.metrics_port, "/metrics", EVIL) == 403  # has no TLS


def test_a_token_makes_the_name_irrelevant(start: Start, tmp_path: Path) -> None:
    secret = {"authorization": "Bearer secret", **EVIL}
    server = start(tokens=tokens(tmp_path, "secret"))
    assert (status(server.port, "/v2", EVIL), status(server.port, "/v2", secret)) == (401, 200)
    assert status(server.metrics_port, "/metrics", EVIL) == 403  # needs no token
    server = start(tokens=tokens(tmp_path, "secret name=prometheus scopes=metrics"))
    assert status(server.metrics_port, "/metrics", EVIL) == 401
    assert status(server.metrics_port, "/metrics", secret) == 200


def test_requests_that_repeat_obey_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    short: list[bool] = []
    begin = Exchange.start

    def record(exchange: Exchange, data: bytes) -> bool:
        short.append(begin(exchange, data))
        return short[-1]

    monkeypatch.setattr(Exchange, "start", record)
    named = request().replace(b"Host: x", b"Host: evil.example")
    with connect(start()) as connection:
        for _ in range(3):
            assert exchange(connection, named)[0] == 403
        assert not any(short)
        for _ in range(3):
            assert exchange(connection, request())[0] == 200
        assert short[-2:] == [True, True]
