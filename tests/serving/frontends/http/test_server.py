"""The HTTP front end: ports, certificates, tokens, the access log, and graceful shutdown."""

import contextlib
import http.client
import itertools
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from convoy.auth import TokenFile
from convoy.tls import TlsFiles
from serving.errors import InvalidArgument, StartupError
from serving.frontends.common.auth import SCOPES
from serving.frontends.common.services import Services
from serving.frontends.http import HttpFrontend, HttpSettings
from serving.frontends.http.executor import MAX_INLINE_BYTES
from serving.protocol.json_codec import parse_request
from serving.protocol.json_responses import render_response
from tests.serving.certificates import Authority, write
from tests.serving.fake_repository import PATIENCE_S, backend_of
from tests.serving.frontends.http.conftest import ANY_PORT, MAX_BODY, Start

INFER = "/v2/models/twice/infer"
REQUEST = {"inputs": [{"name": "numbers", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


def url(server: HttpFrontend, path: str = "", *, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.port}{path}"


class TestListening:
    def test_two_ports(self, start: Start) -> None:
        server = start()
        assert server.port != server.metrics_port
        assert httpx.get(url(server, "/v2")).json()["name"] == "convoy"
        metrics = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics")
        assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'nv_inference_count{model="twice",version="1"} 0.0\n' in metrics.text
        assert httpx.get(f"http://127.0.0.1:{server.metrics_port}/v2").status_code == 404

    @pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
    def test_responses_are_sent_at_once(self, start: Start, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if loop == "asyncio":
            monkeypatch.setitem(sys.modules, "uvloop", None)
        server = start()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert server._api_server._server is not None
            (served,) = server._api_server._server.server_state.connections
            assert type(served.loop).__module__.startswith(loop)
            accepted = served.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    @pytest.mark.parametrize("which", ["port", "metrics_port"])
    def test_a_port_in_use(self, own_services: Services, which: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            address = replace(ANY_PORT, **{which: port})
            server = HttpFrontend(own_services, address, max_message_bytes=MAX_BODY)
            with pytest.raises(StartupError, match=f"^cannot listen on 127.0.0.1 port {port}: Address already in use$"):
                server.start()

    def test_an_unknown_host(self, own_services: Services) -> None:
        address = HttpSettings(host="no.such.host.invalid", port=0, metrics_port=0)
        with pytest.raises(StartupError, match=r"^cannot listen on no\.such\.host\.invalid port 0: "):
            HttpFrontend(own_services, address, max_message_bytes=MAX_BODY).start()

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
    def test_all_addresses(self, start: Start) -> None:
        server = start(HttpSettings(host="::", port=0, metrics_port=0))
        assert httpx.get(url(server, "/v2/health/live")).status_code == 200
        assert httpx.get(f"http://[::1]:{server.port}/v2/health/live").status_code == 200

    @pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 50_000])
    def test_other_protocols_do_no_harm(self, start: Start, garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
        server = start()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        assert httpx.post(url(server, INFER), json=REQUEST).status_code == 200
        assert "Traceback" not in caplog.text

    def test_a_header_too_large(self, start: Start) -> None:
        server = start()
        with contextlib.suppress(httpx.TransportError):  # the refusal may arrive before the whole header is sent
            assert httpx.get(url(server, "/v2"), headers={"x": "y" * 1_000_000}).status_code == 400
        assert httpx.get(url(server, "/v2")).status_code == 200


class TestToken:
    @pytest.fixture
    def token(self, tmp_path: Path) -> TokenFile:
        path = tmp_path / "token"
        path.write_text("secret")
        path.chmod(0o600)
        return TokenFile(path, SCOPES)

    def test_everything_except_health_and_metrics_needs_it(self, start: Start, token: TokenFile) -> None:
        server = start(tokens=token)
        paths = ("/v2", INFER, "/v2/models/twice", "/v2/models/twice/ready", "/nothing", "//v2/health/live")
        with httpx.Client() as client:
            for path, shown in itertools.product(paths, (None, b"Bearer wrong", b"Bearer s\xe9cret", b"secret")):
                headers = [] if shown is None else [(b"authorization", shown)]
                response = client.request("POST" if path == INFER else "GET", url(server, path), headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert "expected header 'Authorization: Bearer TOKEN'" in response.json()["error"]
        assert httpx.get(url(server, "/v2/health/live")).status_code == 200
        assert httpx.get(url(server, "/v2/health/ready")).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics").status_code == 200

    def test_a_length_that_no_body_may_have_does_not_use_up_a_quota(self, start: Start, tmp_path: Path) -> None:
        """A declared petabyte locked its caller out for three years."""
        path = tmp_path / "tokens"
        path.write_text("secret name=a scopes=infer bytes_per_second=100M")
        path.chmod(0o600)
        server = start(tokens=TokenFile(path, SCOPES))
        head = f"POST {INFER} HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Length: {10**15}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        assert httpx.get(url(server, "/v2"), headers={"Authorization": "Bearer secret"}).status_code == 200

    def test_requests_with_it_are_served(self, start: Start, token: TokenFile) -> None:
        response = httpx.post(url(start(tokens=token), INFER), json=REQUEST, headers={"Authorization": "Bearer secret"})
        assert response.json()["outputs"][1]["data"] == [6]


class TestTls:
    @pytest.fixture
    def authority(self) -> Authority:
        return Authority()

    @pytest.fixture
    def trust(self, authority: Authority) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=authority.certificate.decode())

    def test_certificates_are_reloaded(
        self, start: Start, authority: Authority, trust: ssl.SSLContext, tmp_path: Path
    ) -> None:
        files = TlsFiles(*write(tmp_path, authority.issue()))
        server = start(tls=files)
        assert httpx.post(url(server, INFER, scheme="https"), json=REQUEST, verify=trust).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(url(server, "/v2"))
        other = Authority("another authority")
        write(tmp_path, other.issue())
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url(server, "/v2", scheme="https"), verify=trust)
        trust_other = ssl.create_default_context(cadata=other.certificate.decode())
        assert httpx.get(url(server, "/v2", scheme="https"), verify=trust_other).status_code == 200

    def test_clients_need_a_certificate_under_mutual_tls(
        self, start: Start, authority: Authority, trust: ssl.SSLContext, tmp_path: Path
    ) -> None:
        (tmp_path / "ca.crt").write_bytes(authority.certificate)
        server = start(tls=TlsFiles(*write(tmp_path, authority.issue()), tmp_path / "ca.crt"))
        with pytest.raises(httpx.TransportError):
            httpx.get(url(server, "/v2", scheme="https"), verify=trust)
        mine = tmp_path / "mine"
        mine.mkdir()
        trust.load_cert_chain(*write(mine, authority.issue("caller")))
        assert httpx.get(url(server, "/v2", scheme="https"), verify=trust).status_code == 200

    def test_probes_need_no_certificate_at_the_metrics_port(
        self, start: Start, own_services: Services, authority: Authority, tmp_path: Path
    ) -> None:
        (tmp_path / "ca.crt").write_bytes(authority.certificate)
        server = start(tls=TlsFiles(*write(tmp_path, authority.issue()), tmp_path / "ca.crt"))
        health = f"http://127.0.0.1:{server.metrics_port}/v2/health"
        assert httpx.get(f"{health}/live").json() == {"live": True}
        assert httpx.get(f"{health}/ready").json() == {"ready": True}
        own_services.admin.health.drain()
        assert httpx.get(f"{health}/live").status_code == 200
        assert httpx.get(f"{health}/ready").status_code == 400


class TestEventLoops:
    """What takes time holds up neither small requests nor probes."""

    LARGE = REQUEST | {"id": "x" * MAX_INLINE_BYTES}

    @pytest.fixture
    def blocked(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Semaphore, threading.Event]]:
        """Large requests wait: counts those that are being parsed, until an event."""
        parsing, go_on = threading.Semaphore(0), threading.Event()

        def parse(body: bytes, *arguments: Any) -> Any:
            if len(body) > MAX_INLINE_BYTES:
                parsing.release()
                assert go_on.wait(PATIENCE_S)
            return parse_request(body, *arguments)

        monkeypatch.setattr("serving.protocol.json_infer.parse_request", parse)
        yield parsing, go_on
        go_on.set()

    def test_large_json_is_parsed_elsewhere(
        self, start: Start, blocked: tuple[threading.Semaphore, threading.Event]
    ) -> None:
        server = start()
        parsing, go_on = blocked
        with ThreadPoolExecutor(1) as pool:
            large = pool.submit(httpx.post, url(server, INFER), json=self.LARGE, timeout=60)
            assert parsing.acquire(timeout=PATIENCE_S)
            assert httpx.post(url(server, INFER), json=REQUEST).status_code == 200
            go_on.set()
            assert large.result().json()["id"] == self.LARGE["id"]

    def test_the_number_of_large_requests_is_bounded(
        self, start: Start, blocked: tuple[threading.Semaphore, threading.Event]
    ) -> None:
        server = start()
        _, go_on = blocked
        limits = httpx.Limits(max_connections=80)
        with httpx.Client(limits=limits, timeout=60) as client, ThreadPoolExecutor(80) as pool:
            calls = [pool.submit(client.post, url(server, INFER), json=self.LARGE) for _ in range(80)]
            refused = next(call.result() for call in as_completed(calls))
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert httpx.post(url(server, INFER), json=REQUEST).status_code == 200
            go_on.set()
            statuses = Counter(call.result().status_code for call in calls)
        assert set(statuses) == {200, 429}
        assert statuses[200] >= 64

    def test_metrics_and_probes_have_their_own(
        self, start: Start, own_services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = start()
        began, go_on = threading.Event(), threading.Event()

        def hold_up() -> Any:
            began.set()
            assert go_on.wait(PATIENCE_S)
            raise InvalidArgument("over")

        monkeypatch.setattr(own_services.admin, "server_metadata", hold_up)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(httpx.get, url(server, "/v2"), timeout=60)
            assert began.wait(PATIENCE_S)
            for path in ("/metrics", "/v2/health/live", "/v2/health/ready"):
                assert httpx.get(f"http://127.0.0.1:{server.metrics_port}{path}").status_code == 200
            go_on.set()
            assert waiting.result().status_code == 400

    def test_large_json_is_rendered_elsewhere(
        self, start: Start, own_services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads = set()

        def render(*arguments: Any) -> Any:
            threads.add(threading.current_thread().name.split("_")[0])
            return render_response(*arguments)

        monkeypatch.setattr("serving.protocol.json_infer.render_response", render)
        monkeypatch.setattr("serving.protocol.json_infer.MAX_INLINE_OUTPUT_BYTES", 0)
        server = start()
        for limit, thread in ((0, "http-body"), (1 << 20, "http")):
            monkeypatch.setattr("serving.frontends.http.infer.MAX_INLINE_OUTPUT_BYTES", limit)
            threads.clear()
            assert httpx.post(url(server, INFER), json=REQUEST).json()["outputs"][1]["data"] == [6]
            assert threads == {thread}


class TestAccessLog:
    def test_has_an_entry_for_each_request(self, start: Start, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "serving.access")
        server = start(access_log=True)
        httpx.post(url(server, INFER), json=REQUEST)
        httpx.get(url(server, "/v2/models/no%0Athing"))
        server.stop(5)  # an entry is written after the response
        fields = [record.fields for record in caplog.records if record.name == "serving.access"]  # type: ignore[attr-defined]
        assert [(line["method"], line["status"]) for line in fields] == [
            (f"POST {INFER}", "200"),
            ("GET /v2/models/no%0Athing", "404"),
        ]
        assert all(line["peer"].startswith("127.0.0.1:") for line in fields)


class TestStop:
    def test_requests_in_flight_finish(self, start: Start, own_services: Services) -> None:
        server = start()
        backend = backend_of(own_services.admin.repository.get("twice"))
        backend.free.clear()
        with ThreadPoolExecutor(2) as pool, httpx.Client(timeout=60) as idle:
            assert idle.get(url(server, "/v2")).status_code == 200
            under_way = pool.submit(httpx.post, url(server, INFER), json=REQUEST, timeout=60)
            assert backend.began.acquire(timeout=PATIENCE_S)
            stopping = pool.submit(server.stop, PATIENCE_S)
            _wait_until_refused(server.port)
            assert not stopping.done()
            backend.free.set()
            assert under_way.result().json()["outputs"][1]["data"] == [6]
            stopping.result(timeout=PATIENCE_S)

    def test_requests_that_exceed_the_grace_period_are_cut_off(self, start: Start, own_services: Services) -> None:
        server = start()
        backend = backend_of(own_services.admin.repository.get("twice"))
        backend.free.clear()
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(httpx.post, url(server, INFER), json=REQUEST, timeout=60)
            assert backend.began.acquire(timeout=PATIENCE_S)
            server.stop(0)
            assert under_way.result().status_code == 503
            assert under_way.result().json() == {"error": "the server is shutting down"}
        backend.free.set()  # its response comes after the server has stopped
        with pytest.raises(httpx.ConnectError):
            httpx.get(url(server, "/v2"))

    def test_callers_are_refused_in_plain_words(self, start: Start) -> None:
        server = start()
        outcomes: set[tuple[object, ...]] = set()
        served = threading.Barrier(17, timeout=60)

        def call() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
            for number in itertools.count():
                try:
                    connection.request("POST", INFER, json.dumps(REQUEST))
                    response = connection.getresponse()
                    response.read()
                except ConnectionRefusedError:
                    return
                outcomes.add((response.status, response.getheader("connection"), response.getheader("retry-after")))
                if number == 3:
                    served.wait()

        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(call) for _ in range(16)]
            served.wait()
            server.stop(PATIENCE_S)
            for done in calls:
                done.result(timeout=PATIENCE_S)
        assert outcomes == {(200, None, None), (503, "close", "1")}

    def test_a_request_on_an_idle_connection_is_refused(self, start: Start) -> None:
        server = start()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            stopping = threading.Thread(target=server.stop, args=(PATIENCE_S,))
            stopping.start()
            _wait_until_refused(server.port)
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
            stopping.join()

    @pytest.mark.parametrize("sent", [b"", b"GET", b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"])
    def test_connections_that_say_nothing_do_not_delay_it(self, start: Start, sent: bytes) -> None:
        server = start()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(sent)
            assert httpx.get(url(server, "/v2")).status_code == 200
            began = time.monotonic()
            server.stop(PATIENCE_S)
            assert time.monotonic() - began < PATIENCE_S / 3

    def test_a_tls_connection_that_says_nothing_does_not_delay_it(self, start: Start, tmp_path: Path) -> None:
        authority = Authority()
        files = TlsFiles(*write(tmp_path, authority.issue()))
        server = start(tls=files)
        context = ssl.create_default_context(cadata=authority.certificate.decode())
        plain = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            began = time.monotonic()
            server.stop(PATIENCE_S)
            assert time.monotonic() - began < PATIENCE_S / 3

    def test_a_body_that_does_not_arrive_is_cut_off(self, start: Start, caplog: pytest.LogCaptureFixture) -> None:
        server = start()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(b"POST /v2/models/twice/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.1)
            server.stop(0)
            received = connection.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close" in received
        assert "Traceback" not in caplog.text

    def test_connections_stay_open_while_a_model_is_not_ready(self, start: Start, own_services: Services) -> None:
        server = start()
        own_services.admin.health.update(False, {"twice": True})
        with httpx.Client() as client:
            assert client.get(url(server, "/v2/health/ready")).status_code == 400
            assert "connection" not in client.post(url(server, INFER), json=REQUEST).headers

    def test_connections_close_while_the_server_drains(self, start: Start, own_services: Services) -> None:
        server = start()
        with httpx.Client() as client:
            assert "connection" not in client.post(url(server, INFER), json=REQUEST).headers
            own_services.admin.health.drain()
            response = client.post(url(server, INFER), json=REQUEST)
            assert (response.status_code, response.headers["connection"]) == (200, "close")
            ready = client.get(url(server, "/v2/health/ready"))
            assert (ready.status_code, ready.json()) == (400, {"ready": False})
            assert client.get(url(server, "/v2/health/live")).status_code == 200

    def test_no_thread_is_left(self, start: Start) -> None:
        before = set(threading.enumerate())
        server = start()
        httpx.post(url(server, INFER), json=REQUEST)
        assert set(threading.enumerate()) - before
        server.stop(5)
        assert set(threading.enumerate()) <= before


def _wait_until_refused(port: int) -> None:
    for _ in range(3000):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=0.02).close()
        except ConnectionRefusedError:
            return
        except TimeoutError:  # the server is about to close the port
            continue
        threading.Event().wait(0.01)
    pytest.fail("the port is still open")
