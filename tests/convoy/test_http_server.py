"""Tests of what HTTP servers share: their sockets, TLS handshakes, and the end of a port."""

import asyncio
import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from convoy import handshakes, http_server
from convoy.http_server import Server, open_listener, stop_listening
from tests.serving.certificates import Authority, write

PATIENCE_S = 20.0

NewLoop = Callable[[], asyncio.AbstractEventLoop]

LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)

APP = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_responses_do_not_wait_for_acknowledgements(host: str) -> None:
    with open_listener(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_a_port_in_use_is_one_sentence() -> None:
    with open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1 port {port}: Address already in use$"):
            open_listener("127.0.0.1", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_has_connected_is_accepted_and_nobody_else_connects(host: str) -> None:
    with open_listener(host, 0) as listener:
        address = listener.getsockname()[:2]
        with socket.create_connection(address) as first, socket.create_connection(address) as second:
            stopping = threading.Thread(target=asyncio.run, args=(stop_listening(listener),))
            stopping.start()
            stopping.join(0.1)
            assert stopping.is_alive()
            for client in (first, second):
                accepted, _ = listener.accept()
                with accepted:
                    client.sendall(b"who has connected")
                    assert accepted.recv(100) == b"who has connected"
            stopping.join()
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.1)


def test_nobody_waits_for_a_loop_that_accepts_nothing() -> None:
    with open_listener("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        asyncio.run(stop_listening(listener))


def test_a_server_answers_who_has_connected_when_it_is_told_to_stop() -> None:
    class LastMoment(Server):
        """Somebody connects when the server is about to close its port."""

        async def on_tick(self, counter: int) -> bool:
            if counter == 1:
                late.connect(listener.getsockname())
                late.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                self.should_exit = True
            return await super().on_tick(counter)

    with open_listener("127.0.0.1", 0) as listener, socket.socket() as late:
        late.settimeout(PATIENCE_S)
        asyncio.run(LastMoment(APP, None).serve(sockets=[listener]))
        assert late.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_server_does_not_wait_for_who_is_accepted_when_its_port_closes(
    new_loop: NewLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def connect_last(listener: socket.socket) -> None:
        late.connect(listener.getsockname())
        asyncio.get_running_loop().call_soon(server._accept, listener)

    monkeypatch.setattr(http_server, "stop_listening", connect_last)
    server = Server(APP, None, timeout_graceful_shutdown=1)
    server.should_exit = True
    with (
        open_listener("127.0.0.1", 0) as listener,
        socket.socket() as late,
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        runner.run(server.serve(sockets=[listener]))
        assert "timeout graceful shutdown exceeded" not in caplog.text
        assert late.recv(1) == b""


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_protocol_that_cannot_be_made_is_logged(new_loop: NewLoop, caplog: pytest.LogCaptureFixture) -> None:
    def fail(**options: object) -> asyncio.Protocol:
        raise ZeroDivisionError("a defect")

    async def serve_one() -> None:
        server = Server(APP, None, http=fail)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        with connect(listener.getsockname()[1]) as client:
            assert await asyncio.to_thread(client.recv, 1) == b""
        server.should_exit = True
        await serving

    with open_listener("127.0.0.1", 0) as listener, asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve_one())
    assert "ZeroDivisionError: a defect" in caplog.text


@pytest.mark.parametrize("new_loop", LOOPS)
class TestHandshakes:
    """Clients that connect to a port with TLS and say nothing."""

    @pytest.fixture
    def start(
        self, new_loop: NewLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[[], tuple[Server, int]]]:
        certificate, key = write(tmp_path, Authority().issue())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)

        with contextlib.ExitStack() as stack:

            def start() -> tuple[Server, int]:
                server = Server(APP, context)
                listener = stack.enter_context(open_listener("127.0.0.1", 0))

                def run() -> None:
                    with asyncio.Runner(loop_factory=new_loop) as runner:
                        runner.run(server.serve(sockets=[listener]))

                running = threading.Thread(target=run)
                running.start()
                stack.callback(running.join)
                stack.callback(setattr, server, "should_exit", True)
                return server, listener.getsockname()[1]

            yield start

    def test_end_after_a_while(self, start: Callable[[], tuple[Server, int]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.3)
        _, port = start()
        with connect(port) as silent:
            assert silent.recv(1) == b""

    def test_the_oldest_ones_make_room_for_others(
        self, start: Callable[[], tuple[Server, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_server, "max_handshakes", lambda: 3)
        server, port = start()
        assert server.handshakes is not None
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(connect(port)) for _ in range(5)]
            for client in silent[:2]:
                assert client.recv(1) == b""
            assert get(port) == b"here"
            assert silent[2].recv(1) == b""
            assert get(port) == b"here"  # there is room
            assert len(server.handshakes) == 2
            for client in silent[3:]:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # is no TLS
                while client.recv(100):
                    pass
            assert get(port) == b"here"
            assert len(server.handshakes) == 0

    def test_do_not_delay_the_end_of_a_server(self, start: Callable[[], tuple[Server, int]]) -> None:
        server, port = start()
        assert server.handshakes is not None
        with connect(port) as silent:
            while not server.handshakes:
                time.sleep(0.01)
            server.should_exit = True
            assert silent.recv(1) == b""


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def get(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.closing(
        http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE_S, context=context)
    ) as client:
        client.request("GET", "/")
        return client.getresponse().read()
