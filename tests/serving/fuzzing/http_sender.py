"""Sends messages over HTTP, on several connections at a time, and compares the responses with what is right."""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from serving.protocol.tensors import DATATYPES, to_bytes
from tests.serving.fuzzing.comparison import difference
from tests.serving.fuzzing.http_oracle import HttpExpected
from tests.serving.fuzzing.message import HttpMessage
from tests.serving.fuzzing.oracle import INVALID, Expected
from tests.serving.fuzzing.result import Result

TIMEOUT_S = 30
NUM_CONNECTIONS = 16

HTTP_STATUS: Mapping[int, tuple[int, ...]] = {
    0: (200,),
    3: (400,),
    4: (504,),
    5: (404,),
    8: (429, 413),
    12: (501,),
    14: (503,),
}
"""HTTP's statuses for gRPC's codes."""


def send_http(port: int, messages: Iterable[HttpMessage]) -> Iterator[Result]:
    """Sends the messages. Yields the results, in the order of the responses."""
    free = [_Connection(port) for _ in range(NUM_CONNECTIONS)]
    with selectors.DefaultSelector() as selector:

        def receive() -> Iterator[Result]:
            ready = selector.select(1)
            late = [key.data for key in selector.get_map().values() if key.data.is_late()] if not ready else []
            for connection in [*(key.data for key, _ in ready), *late]:
                result = connection.receive()
                if result is not None:
                    selector.unregister(connection.socket)
                    connection.close_if_ended()
                    free.append(connection)
                    yield result

        for message in messages:
            while not free:
                yield from receive()
            connection = free.pop()
            connection.send(message)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        while len(free) < NUM_CONNECTIONS:
            yield from receive()
    for connection in free:
        connection.close()


class _Connection:
    """A connection with one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._message: HttpMessage | None = None
        self._sent_at = 0.0
        self._has_ended = False

    @property
    def socket(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def send(self, message: HttpMessage) -> None:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._message, self._received, self._has_ended = message, bytearray(), False
        self._sent_at = time.monotonic()
        with contextlib.suppress(ConnectionError):  # the server may refuse a body before it has read all of it
            self._socket.sendall(_request(message))

    def is_late(self) -> bool:
        return time.monotonic() > self._sent_at + TIMEOUT_S

    def receive(self) -> Result | None:
        """Reads what has arrived. Returns the result once the response is complete, or will not come."""
        message = self._message
        assert message is not None
        if self.is_late():
            self._has_ended = True
            return Result(message, "timeout", f"no response in {TIMEOUT_S} s")
        try:
            chunk = self.socket.recv(1 << 18)
        except ConnectionError:
            chunk = b""
        self._received += chunk
        head, end, body = self._received.partition(b"\r\n\r\n")
        headers = _headers(bytes(head))
        size = 0 if message.method == "HEAD" else int(headers.get("content-length", "0"))
        if end and len(body) >= size:
            self._has_ended = headers.get("connection") == "close"
            status = int(head.split(b" ", 2)[1])
            return Result(message, str(status), problem(message, status, headers, bytes(body)))
        if not chunk:
            self._has_ended = True
            return Result(
                message, "disconnected", f"the server closed the connection after {len(self._received)} bytes"
            )
        return None

    def close_if_ended(self) -> None:
        if self._has_ended:
            self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _request(message: HttpMessage) -> bytes:
    headers = {"Host": "localhost", **message.headers}
    body = message.body
    if message.is_chunked:
        headers["Transfer-Encoding"] = "chunked"
        half = len(body) // 2
        body = (
            b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part) + b"0\r\n\r\n"
        )
    elif body or message.method in ("POST", "PUT", "PATCH"):
        headers["Content-Length"] = str(len(body))
    lines = [f"{message.method} {message.target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


# ---- Comparing -------------------------------------------------------------------------------------------------------


def problem(message: HttpMessage, status: int, headers: Mapping[str, str], body: bytes) -> str | None:
    """Returns what is wrong with a response."""
    right = message.statuses
    if message.expected is not None:
        known = message.expected.expected or Expected(frozenset({0, INVALID, 5}))
        right = frozenset(number for code in known.codes for number in HTTP_STATUS[code])
    if status not in right:
        return f"{status} ({body[:300]!r}), expected one of {sorted(right)}"
    try:
        if status != 200:
            return None if status == 405 or message.method != "POST" else _error_problem(body)
        if message.expected is None or message.expected.expected is None:
            return None
        return check_response(message.expected, headers, body)
    except (ValueError, KeyError, TypeError) as error:
        return f"the response cannot be read: {error!r}: {body[:300]!r}"


def _error_problem(body: bytes) -> str | None:
    return None if isinstance(json.loads(body)["error"], str) else f"not an error: {body!r}"


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def check_response(right: HttpExpected, headers: Mapping[str, str], body: bytes) -> str | None:
    """Returns what is wrong with the response to an inference."""
    expected = right.expected
    assert expected is not None
    length = int(headers.get("inference-header-content-length", len(body)))
    value, tail = json.loads(body[:length], parse_constant=_no_constant), body[length:]
    head = (value["model_name"], value["model_version"], value.get("id", ""))
    if head != (expected.model, expected.version, expected.id):
        return f"the response is of {head}, expected {(expected.model, expected.version, expected.id)}"
    names = [output["name"] for output in value["outputs"]]
    if names != [output.name for output in expected.outputs]:
        return f"outputs {names}, expected {[output.name for output in expected.outputs]}"
    for output, got in zip(expected.outputs, value["outputs"], strict=True):
        size = got.get("parameters", {}).get("binary_data_size")
        if (size is not None) != (output.name in right.binary):
            return f"output {output.name} is in the wrong form"
        data = _json_bytes(got) if size is None else tail[:size]
        tail = tail[size or 0 :]
        if size is None and output.array.dtype.kind == "f":  # JSON has no such numbers, and `null` takes their place
            output = replace(
                output, array=np.where(np.isfinite(output.array), output.array, output.array.dtype.type("nan"))
            )
        if wrong := difference(output, got["datatype"], tuple(got["shape"]), data):
            return wrong
    return f"{len(tail)} bytes too many" if tail else None


def _json_bytes(output: dict[str, Any]) -> bytes:
    """Returns the bytes of an output whose elements are in the JSON."""
    kind = DATATYPES[output["datatype"]]
    array = np.empty(len(output["data"]), kind.dtype)
    array[:] = output["data"]
    return to_bytes(array)
