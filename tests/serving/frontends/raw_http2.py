"""A client that sends HTTP/2 frames byte by byte: what grpcio's own client refuses to send."""

import socket
import struct

from tests.serving.frontends.callers import LIVE, WAIT_S

_HEADERS, _DATA, _SETTINGS = 1, 0, 4
_END_STREAM, _END_HEADERS = 1, 4

EMPTY_MESSAGE = bytes(5)


def call(port: int, *metadata: tuple[bytes, bytes], path: str = LIVE, body: bytes = EMPTY_MESSAGE) -> int:
    """Makes one unary call. Returns the number of bytes of its response messages; 0 if it has none."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *metadata,
    ]
    block = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in headers)
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, b""))
        connection.sendall(_frame(_HEADERS, _END_HEADERS, 1, block) + _frame(_DATA, _END_STREAM, 1, body))
        num_bytes = 0
        with connection.makefile("rb") as stream:
            while head := stream.read(9):
                length, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
                stream.read(length)
                num_bytes += length if kind == _DATA else 0
                if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                    break
    return num_bytes


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
