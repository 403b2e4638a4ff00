"""Of a worker that is killed, listeners end before connections: who connects again reaches no worker that is ending."""

import contextlib
import socket
import subprocess
import sys
import threading

import pytest

from serving.workers.listeners import HighListeners

NUM_CONNECTIONS = 30
TIMEOUT_S = 60
WORKER = """
import socket
from serving.workers.listeners import HighListeners

listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
HighListeners().hold(port)
print(port, flush=True)
connections = []
while True:
    connections.append(listener.accept()[0])
    connections[-1].send(b"x")
"""


def test_no_client_whose_connection_has_ended_reaches_the_listener_again() -> None:
    outcomes: list[str] = []

    def connect_again(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            connection.recv(1)
        try:
            socket.create_connection(("127.0.0.1", port), TIMEOUT_S).close()
            outcomes.append("connected")
        except ConnectionError as error:
            outcomes.append(type(error).__name__)

    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        port = int(worker.stdout.readline())
        connections = [socket.create_connection(("127.0.0.1", port), TIMEOUT_S) for _ in range(NUM_CONNECTIONS)]
        assert all(connection.recv(1) for connection in connections), "the worker has accepted all"
        threads = [threading.Thread(target=connect_again, args=(connection,)) for connection in connections]
        for thread in threads:
            thread.start()
        worker.kill()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert outcomes == ["ConnectionRefusedError"] * NUM_CONNECTIONS


def test_a_listener_is_open_until_its_numbers_are_closed() -> None:
    listeners = HighListeners()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        listeners.hold(address[1])
    socket.create_connection(address, TIMEOUT_S).close()
    listeners.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, TIMEOUT_S)
