"""Descriptors that are kept for a listener."""

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from convoy.http_server import open_listener
from convoy.open_files import Reserve


@pytest.fixture
def few_files() -> Iterator[None]:
    """A limit of a few open files more than there are."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@pytest.mark.usefixtures("few_files")
def test_a_listener_accepts_while_others_have_all_other_files() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(open_listener("127.0.0.1", 0))
        listener.setblocking(False)
        clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)]
        reserve = Reserve(2)
        stack.callback(reserve.close)
        with suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(0))
        with reserve.accept(listener) as one, reserve.accept(listener) as two:
            for client, accepted in zip(clients, (one, two), strict=False):
                client.sendall(b"here")
                assert accepted.recv(10) == b"here"
                assert not os.get_inheritable(accepted.fileno())
            with pytest.raises(OSError, match="Too many open files") as refused:
                reserve.accept(listener)
            assert refused.value.errno == errno.EMFILE
            assert reserve.is_short
        reserve.refill()
        assert not reserve.is_short
        reserve.accept(listener).close()
        with pytest.raises(BlockingIOError):
            reserve.accept(listener)
