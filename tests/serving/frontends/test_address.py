"""Private addresses, and the backlog of sockets that listen."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.frontends.common.address import ABSTRACT, check_address, private_address, raise_backlog, socket_path

NUM_CONNECTIONS = 64
WAIT_S = 20


class TestPrivateAddress:
    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no abstract sockets")
    def test_needs_no_file(self) -> None:
        address = private_address("127.0.0.1:0")
        assert address.startswith(ABSTRACT)
        assert address != private_address("127.0.0.1:0")
        check_address(address)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(socket_path(address))
            assert f"@{address.removeprefix(ABSTRACT)}" in Path("/proc/net/unix").read_text()

    def test_is_beside_a_unix_socket(self, tmp_path: Path) -> None:
        address = private_address(f"unix:{tmp_path}/grpc.sock")
        assert Path(socket_path(address)).parent == tmp_path
        assert socket_path(address) != f"{tmp_path}/grpc.sock"


class TestBacklog:
    """A backlog of 1 holds two connections; the kernel lets further ones wait for a second and longer."""

    @pytest.fixture
    def tcp(self) -> Iterator[socket.socket]:
        with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
            yield listener

    @pytest.fixture
    def unix(self, tmp_path: Path) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            listener.listen(1)
            yield listener

    def connect(self, listener: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(NUM_CONNECTIONS):
                client = stack.enter_context(socket.socket(listener.family))
                client.settimeout(WAIT_S)
                client.connect(listener.getsockname())

    def test_of_a_port_grows(self, tcp: socket.socket) -> None:
        raise_backlog(tcp.getsockname()[1])
        self.connect(tcp)

    def test_of_a_path_grows(self, unix: socket.socket) -> None:
        raise_backlog(unix.getsockname())
        self.connect(unix)

    def test_of_other_sockets_stays(self, unix: socket.socket) -> None:
        raise_backlog("/another/socket")
        with pytest.raises(BlockingIOError):
            self.connect(unix)
