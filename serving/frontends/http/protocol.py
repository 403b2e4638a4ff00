"""HTTP/1.1 by httptools, with bounds on the size of request heads and on the time that clients may take."""

import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.frontends.http import connections
from serving.frontends.http.connections import Connections, RateWindow
from serving.frontends.http.fast_path import Exchange, FastPath
from serving.frontends.http.transport import LingeringTransport
from serving.observability.calls import UNKNOWN
from serving.observability.refusals import Refusals

MAX_HEAD_BYTES = 64 << 10
"""Of an incomplete request line with headers, or of trailers; the same limit as uvicorn sets for h11."""
MAX_HEADERS = 256
"""Of a request. Each takes fifty times its bytes if it is short."""
MAX_PIPELINED = 256
"""Requests that wait on a connection. Further ones are not read, and the connection ends after those that are."""


class _Malformed(Exception):
    """A request is refused for its head, which httptools accepts; the message says why."""


class _PipelineFull(Exception):
    """Too many requests wait on a connection."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Refuses what httptools and uvicorn would wait for or collect without end.

    Args:
        peers: all connections of the port.
        refusals: counts requests that are refused here, before the application sees them.
        fast_path: of inferences that repeat; None without one.
    """

    transport: Any  # a LingeringTransport

    def __init__(
        self, *args: Any, peers: Connections, refusals: Refusals, fast_path: FastPath | None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._exchange = None if fast_path is None else Exchange(fast_path, self)
        self._piece = b""  # the bytes that are being parsed; empty unless a request begins with them
        self._peers = peers
        self._refusals = refusals
        self._num_pending_bytes = 0  # since the last complete head, piece of a body, or request
        self._num_received = 0
        self._has_served = False
        self._is_receiving = False  # a request has begun, and not ended
        self._is_in_head = False
        self._is_full = False  # no more requests are read
        self._reading, self._writing = RateWindow(), RateWindow()
        self._num_unsent = 0
        self.waits_since = 0.0

    # ---- uvicorn's and httptools' callbacks --------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(LingeringTransport(transport, self.loop, lambda: self._is_receiving))  # type: ignore[arg-type]
        self.waits_since = self.loop.time()
        if not self._peers.add(self):
            self._refuse(503, "all connections of this server are in use: retry later", "connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.discard(self)
        super().connection_lost(exc)
        if self._exchange is not None:
            self._exchange.cancel()
            self._exchange = None  # it refers to this connection

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._is_full:
            return
        self._num_received += len(data)
        exchange = self._exchange
        if (
            exchange is not None
            and exchange.head
            and data.startswith(exchange.head)
            and self._is_idle()
            and exchange.start(data)
        ):
            self.cycle = exchange  # type: ignore[assignment]  # looks like one
            return
        self._num_pending_bytes += len(data)
        self._unset_keepalive_if_required()
        self._piece = b"" if self._is_receiving else data
        self._feed(data)
        self._piece = b""
        if self._num_pending_bytes > MAX_HEAD_BYTES and not (self._is_full or self.transport.is_closing()):
            self.send_400_response(f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _PipelineFull):
                self._end_after_waiting()
            elif isinstance(error.__context__, _Malformed):
                self.send_400_response(str(error.__context__))
            else:
                self.send_400_response("the request is not HTTP/1.1")

    def _end_after_waiting(self) -> None:
        """Reads no more requests, and ends the connection after the responses to those that it has read."""
        self._is_full = True
        self.cycle.keep_alive = False  # the last request that waits closes the connection

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parses a request again as if it did not offer another protocol: httptools takes its body for that protocol.

        Java's HttpClient offers HTTP/2 in each first request. A server may ignore it (RFC 9110, section 7.8).
        """
        lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
        self._feed(b"\r\n".join([*lines, b"", b""]) + rest)

    def _is_idle(self) -> bool:
        """Returns whether all requests that have arrived are answered, and the client reads the answers."""
        if self._is_receiving or self.pipeline or self.flow.write_paused:
            return False
        return self.cycle is not None and self.cycle.response_complete

    @property
    def peer(self) -> str:
        host, port = self.client or ("", 0)
        return f"{host}:{port}"

    def send_response(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Sends a response of the fast path, and goes on to the next request."""
        parts = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        is_last = self._exchange is not None and not self._exchange.keep_alive
        if is_last:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        self.transport.write(b"".join(parts))
        if is_last:
            self.transport.close()
        self.on_response_complete()

    def expire(self) -> bool:
        """Answers the request that the grace period cuts off, if it is on the fast path. Returns whether it is."""
        return self._exchange is not None and self._exchange.expire()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if (exchange := self._exchange) is not None:
            exchange.head = b""
        self._is_receiving = True
        self.waits_since = self.loop.time()
        self._is_in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return  # a trailer: it must not pass for a header that has been checked
        if len(self.headers) >= MAX_HEADERS:
            raise _Malformed(f"the request has more than {MAX_HEADERS} headers")
        super().on_header(name, value.rstrip(b" \t"))  # which httptools leaves (RFC 9112, section 5.1)

    def on_headers_complete(self) -> None:
        if self._offers_upgrade():
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _PipelineFull
        if len({name for name, _ in self.headers}) < len(self.headers):
            self._join_headers()
        self._num_pending_bytes = 0
        self._reading.start(self.loop.time(), self._num_received)
        super().on_headers_complete()
        self._is_in_head = False
        if self._piece and (exchange := self._exchange) is not None:
            exchange.remember(self._piece)
            self._piece = b""
        if self.scope["raw_path"].endswith(b"/"):
            self.scope["path"] = self.scope["path"].rstrip("/") or "/"
        if self.scope["http_version"] == "1.0":
            self._begin_old()

    def _join_headers(self) -> None:
        """Joins the values of each header that comes several times (RFC 9110, section 5.3): all readers see the same.

        Raises:
            _Malformed: it is Host, of which one may have been checked, and another be used (RFC 9112, section 3.2).
        """
        joined: dict[bytes, bytes] = {}
        for name, value in self.headers:
            if name == b"host" and name in joined:
                raise _Malformed("the request has more than one Host")
            joined[name] = joined[name] + b", " + value if name in joined else value
        self.headers[:] = joined.items()

    def _begin_old(self) -> None:
        """Begins a request of HTTP/1.0: its client knows no status 100, and its connection lasts if it asks for that.

        Not with a transfer encoding, which a proxy before this server may not have understood (RFC 9112, section 6.1).
        """
        self.cycle.waiting_for_100_continue = False
        if self.parser.should_keep_alive() and b"transfer-encoding" not in dict(self.headers):
            self.cycle.keep_alive = True
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"keep-alive")]

    def on_body(self, body: bytes) -> None:
        self._num_pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade():
            return
        self._num_pending_bytes = 0
        self._is_receiving = False
        super().on_message_complete()

    def _offers_upgrade(self) -> bool:
        upgrades: bool = self.parser.should_upgrade()
        return upgrades and self.parser.get_method() != b"CONNECT"

    def on_response_complete(self) -> None:
        self._has_served = True
        self.waits_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg, "malformed")

    def shutdown(self) -> None:
        """Ends the connection soon: after its response, or once its client has sent nothing for a moment."""
        if self.is_waiting:
            self.loop.call_later(connections.GOODBYE_S, self._close_if_waiting)
        else:
            super().shutdown()

    def _close_if_waiting(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()
        if self.transport.is_closing():  # with TLS, it would wait for the client's goodbye
            self.loop.call_later(connections.GOODBYE_S, self.transport.abort)

    # ---- time limits -------------------------------------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        return not self.pipeline and (self.cycle is None or self.cycle.response_complete or self.cycle.more_body)

    def abort(self) -> None:
        self.transport.abort()

    def check(self, now: float) -> None:
        """Closes the connection if its client is too slow to send a request or to read a response."""
        if self._does_not_read(now):
            self.abort()
        elif self.transport.is_closing() or not self.is_waiting:
            return
        elif self._is_receiving:
            self._check_request(now)
        else:
            limit = connections.KEEP_ALIVE_S if self._has_served else connections.FIRST_BYTE_S
            if now - self.waits_since >= limit:
                self.transport.close()

    def _check_request(self, now: float) -> None:
        """Closes the connection if its request takes too long to arrive."""
        waited = now - self.waits_since
        if self._is_in_head:
            if waited >= connections.HEAD_S:
                self._refuse(408, f"the request's head took longer than {connections.HEAD_S:g} s", "timeout")
        elif self.flow.read_paused:  # uvicorn has paused it: the client cannot go on
            self._reading.start(now, self._num_received)
        elif waited >= connections.REQUEST_S or self._reading.is_too_slow(now, self._num_received):
            if self.cycle.response_complete:  # refused before its body had arrived
                self.transport.close()
                return
            rate = connections.MIN_WINDOW_BYTES / connections.WINDOW_S / 1024
            self._refuse(408, f"the request's body arrived at less than {rate:g} KiB/s", "timeout")

    def _does_not_read(self, now: float) -> bool:
        """Returns whether the client leaves a response unread."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or self._num_unsent == 0 or unsent > self._num_unsent:
            self._writing.start(now, -unsent)
        self._num_unsent = unsent
        return unsent > 0 and self._writing.is_too_slow(now, -unsent)

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Sends an error that the application knows nothing of, and closes the connection.

        It must not pass for the response to a request before it, which comes first.
        """
        self._refusals.count(reason, method=UNKNOWN)
        is_in_body = self._is_receiving and not self._is_in_head
        if is_in_body and self.is_waiting and self.cycle.response_complete:
            self.transport.close()
        elif is_in_body and (not self.is_waiting or self.cycle.response_started):
            self.abort()
        elif not self.is_waiting:
            self._end_after_waiting()
        else:
            self._send_refusal(status, message)

    def _send_refusal(self, status: int, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        headers = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        if status == 503:
            headers += b"retry-after: 1\r\n"
        self.transport.write(STATUS_LINE[status] + headers + b"\r\n" + body)
        if self in self._peers:
            self.transport.linger()
        else:  # over the limit of connections, which lingering would exceed further
            self.transport.close()
