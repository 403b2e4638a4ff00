"""Tests of the sockets on which HTTP servers listen."""

import socket
import threading

import pytest

from convoy.http_server import open_listener, stop_listening


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
            stopping = threading.Thread(target=stop_listening, args=(listener,))
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
        stop_listening(listener)
