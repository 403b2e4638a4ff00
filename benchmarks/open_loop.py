"""gRPC requests at random times of a fixed rate (a Poisson process), over raw HTTP/2 frames.

h2load sends the requests of a rate in bursts every 10 ms, which measures the bursts. Here each request has a time of
its own, and its latency counts from that time, whenever the request could be sent. One thread of Python sends and
receives some 20,000 requests a second. Frames: RFC 9113; headers as literals without Huffman coding: RFC 7541, 6.2.2.
"""

import random
import selectors
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NUM_CONNECTIONS = 4
MAX_STREAMS = 100
"""Requests at a time on one connection: servers must allow as many."""
WINDOW = 65_535
"""Bytes that a client may send before the server's first WINDOW_UPDATE."""
LARGEST_WINDOW = 2**31 - 1
DRAIN_S = 2.0
"""How long to wait for the last responses."""

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Returns an HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def request_head(path: str) -> bytes:
    """Returns the header block of a gRPC call."""
    headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    headers += [("content-type", "application/grpc"), ("te", "trailers")]
    return b"".join(b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in pair) for pair in headers)


def request_frames(stream: int, head: bytes, message: bytes) -> bytes:
    """Returns the frames of a whole unary call."""
    data = b"\0" + struct.pack(">I", len(message)) + message
    return frame(_HEADERS, _END_HEADERS, stream, head) + frame(_DATA, _END_STREAM, stream, data)


@dataclass
class Open:
    """The result of a period at a fixed rate."""

    latencies_us: list[float] = field(default_factory=list)
    num_sent: int = 0
    num_failed: int = 0


class _Connection:
    """One connection. Requests wait in `waiting` while HTTP/2's limits forbid to send them."""

    def __init__(self, port: int, head: bytes, message: bytes, result: Open) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.waiting: deque[float] = deque()
        self.open: dict[int, float] = {}
        self._answered: set[int] = set()
        self._result = result
        self._head, self._message = head, message
        self._size = len(message) + 5
        self._window = WINDOW
        self._next_stream = 1
        self._received = b""
        settings = struct.pack(">HI", 4, LARGEST_WINDOW)  # SETTINGS_INITIAL_WINDOW_SIZE
        update = frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW - WINDOW))
        self.socket.sendall(PREFACE + frame(_SETTINGS, 0, 0, settings) + update)

    def send_waiting(self) -> None:
        """Sends what the server's limits allow."""
        parts = []
        while self.waiting and len(self.open) < MAX_STREAMS and self._window >= self._size:
            self.open[self._next_stream] = self.waiting.popleft()
            parts.append(request_frames(self._next_stream, self._head, self._message))
            self._next_stream += 2
            self._window -= self._size
        if parts:
            self.socket.sendall(b"".join(parts))

    def receive(self) -> None:
        """Reads what has arrived."""
        chunk = self.socket.recv(1 << 18)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        now = time.monotonic()
        data, at = self._received + chunk, 0
        while at + 9 <= len(data):
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > len(data):
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big") & LARGEST_WINDOW
            self._handle(data[at + 3], data[at + 4], stream, data[at + 9 : end], now)
            at = end
        self._received = data[at:]

    def _handle(self, kind: int, flags: int, stream: int, payload: bytes, now: float) -> None:
        if kind == _DATA:
            self._answered.add(stream)
        elif kind == _SETTINGS and not flags & _ACK:
            self.socket.sendall(frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.socket.sendall(frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == _GOAWAY:
            raise ConnectionError(f"the server refuses the connection: {payload[8:]!r}")
        if (flags & _END_STREAM and kind in (_DATA, _HEADERS)) or kind == _RESET:
            due = self.open.pop(stream)
            if stream in self._answered:  # an error has no message
                self._answered.discard(stream)
                self._result.latencies_us.append(1e6 * (now - due))
            else:
                self._result.num_failed += 1


def send_at_rate(port: int, path: str, message: bytes, *, per_second: float, seconds: float) -> Open:
    """Sends a serialised message again and again. Returns the latencies in microseconds, in the order of the responses.

    Requests without a response `DRAIN_S` after the end count as failed.
    """
    result, rng = Open(), random.Random(0)
    connections = [_Connection(port, request_head(path), message, result) for _ in range(NUM_CONNECTIONS)]
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        end = time.monotonic() + seconds
        due = time.monotonic() + rng.expovariate(per_second)
        while True:
            now = time.monotonic()
            while due <= min(now, end):
                connections[result.num_sent % NUM_CONNECTIONS].waiting.append(due)
                result.num_sent += 1
                due += rng.expovariate(per_second)
            for connection in connections:
                connection.send_waiting()
            is_idle = not any(connection.open or connection.waiting for connection in connections)
            if now > end and (is_idle or now > end + DRAIN_S):
                break
            # epoll counts whole milliseconds; a shorter wait is none.
            wait_s = max(0.0, (due if due <= end else end + DRAIN_S) - now)
            for key, _ in selector.select(wait_s if wait_s > 0.002 else 0):
                key.data.receive()
    for connection in connections:
        result.num_failed += len(connection.open) + len(connection.waiting)
        connection.socket.close()
    return result
