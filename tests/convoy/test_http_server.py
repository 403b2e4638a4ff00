"""Tests of the sockets on which HTTP servers listen."""

import socket

import pytest

from convoy.http_server import open_listener


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
