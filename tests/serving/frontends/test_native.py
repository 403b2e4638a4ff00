"""What only the native front end has: a private grpcio server behind it, and a listening socket of pygrpc-native."""

import contextlib
import functools
import socket
import struct
import tempfile
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from serving.errors import StartupError
from serving.frontends import Frontend
from serving.frontends.grpcio.handlers import REFLECTION
from serving.frontends.native import NativeFrontend
from tests.serving.frontends.callers import INFER, LIMIT, WAIT_S, Serve, Stream, ask, response
from tests.serving.frontends.fake_service import FakeServices

TCP_INFO_BACKLOG = 28
"""Offset in Linux's struct tcp_info of `tcpi_sacked`, which is the backlog of a socket that listens."""


@pytest.fixture
def kind() -> str:
    return "native"


def check_streams(target: str) -> None:
    """Checks that calls reach the server behind the front end."""
    with grpc.insecure_channel(target) as channel:
        assert ask(channel, INFER, b"abc") == b"ABC"
        stream = Stream(channel)
        stream.send(b"")
        stream.close()
        assert stream.next() == response("")
        call = channel.stream_stream(REFLECTION[0])
        request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        assert len(list(call(iter([request]), timeout=WAIT_S))) == 1


@pytest.mark.parametrize("folder", ["missing", "x" * 90])
def test_needs_no_temporary_folder(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Neither one that does not exist nor one whose path is too long for a socket."""
    if folder != "missing":
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    check_streams(f"127.0.0.1:{serve().port}")
    assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


def test_a_unix_socket_keeps_streams_in_its_folder(serve: Serve, tmp_path: Path) -> None:
    server = serve(address=f"unix:{tmp_path}/grpc.sock")
    check_streams(f"unix:{tmp_path}/grpc.sock")
    assert {path.name for path in tmp_path.iterdir()} == {"grpc.sock", "grpc.sock.streams"}
    server.stop(0)
    assert list(tmp_path.iterdir()) == []


def test_sockets_left_by_a_killed_server_are_replaced(serve: Serve, tmp_path: Path) -> None:
    for name in ("grpc.sock", "grpc.sock.streams"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
    serve(address=f"unix:{tmp_path}/grpc.sock")
    check_streams(f"unix:{tmp_path}/grpc.sock")


def test_a_start_that_fails_leaves_no_socket(services: FakeServices, tmp_path: Path) -> None:
    path = tmp_path / ("x" * (105 - len(str(tmp_path))))  # fits, and is too long with a suffix
    server = NativeFrontend(services, address=f"unix:{path}", max_message_bytes=LIMIT)  # type: ignore[arg-type]
    with pytest.raises(StartupError, match="path too long"):
        server.start()
    server.stop(0)
    assert list(tmp_path.iterdir()) == []


def test_many_connections_may_wait_to_be_accepted(server: Frontend) -> None:
    """More than 128, which is pygrpc-native's own backlog."""
    listening = functools.partial(socket.fromfd, family=socket.AF_INET, type=socket.SOCK_STREAM)
    backlogs = []
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), listening(int(number.name)) as found:
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.getsockname()[1] == server.port:
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
                backlogs += struct.unpack_from("=I", info, TCP_INFO_BACKLOG)
    [backlog] = backlogs
    assert backlog == min(4096, int(Path("/proc/sys/net/core/somaxconn").read_text()))
