"""What all HTTP servers of this project share: the socket that they listen on, uvicorn, and events."""

import asyncio
import contextlib
import ctypes
import json
import os
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp

from convoy.handshakes import Handshakes, max_handshakes
from convoy.open_files import Reserve

BACKLOG = 2048

_ACCEPTS_AT_ONCE = 64
"""Connections that are accepted before others are served."""
_PAUSE_S = 0.05
"""How long a server waits for a free descriptor before it accepts again."""
_SETTLE_S, _DRAIN_S, _POLL_S = 0.05, 1.0, 0.005
_SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>
_DROP_SYN = struct.pack(
    "HBBI" * 5,
    *(0x30, 0, 0, 13),  # load the flags of the TCP header
    *(0x54, 0, 0, 0x12),  # of which SYN and ACK
    *(0x15, 0, 1, 0x02),  # if it is SYN alone,
    *(0x06, 0, 0, 0),  # drop the packet;
    *(0x06, 0, 0, 0xFFFFFFFF),  # else take it
)
_ACCEPT_QUEUE = slice(24, 28)  # of tcp_info, <linux/tcp.h>: `tcpi_unacked`, which counts the queue if a socket listens


class _NumberConvertor(Convertor[int]):
    """A path parameter `{id:number}`. Starlette's `int` fails with 500 at a number of thousands of digits."""

    regex = "[0-9]{1,10}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("number", _NumberConvertor())


def open_listener(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Returns a listening socket. On `::`, all addresses of IPv6, it listens on those of IPv4 too.

    Args:
        port: 0 for any that is free.
        reuse_port: whether other processes may listen on it too.

    Raises:
        OSError: the address is not available; says why in one sentence.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both, reuse_port=reuse_port
        )
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise OSError(f"cannot listen on {host} port {port}: {why}") from error
    # Connections inherit it. uvloop sets it too, asyncio only on sockets made with proto=IPPROTO_TCP. Without it, a
    # response in several packets takes 40 ms more.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def stop_listening(listener: socket.socket) -> None:
    """Lets nobody else connect to a listening socket, and returns once the event loop has accepted those who have.

    The kernel resets the connections that wait to be accepted when a socket closes: their clients fail although the
    server would answer them. So a filter drops the packets that open connections; their clients try again after a
    second and are refused, or reach another server on this port. Takes 0.05 s, and at most 1 s. Does nothing where
    the kernel has no such filter.
    """
    program = ctypes.create_string_buffer(_DROP_SYN)
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 5, ctypes.addressof(program)))
        began = time.monotonic()
        while (passed := time.monotonic() - began) < _SETTLE_S or (passed < _DRAIN_S and _num_waiting(listener)):
            await asyncio.sleep(_POLL_S)


def _num_waiting(listener: socket.socket) -> int:
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACCEPT_QUEUE.stop)
    return int.from_bytes(info[_ACCEPT_QUEUE], sys.byteorder)


class Server(uvicorn.Server):
    """uvicorn without its own logging and its headers about itself, and with bounds for TLS handshakes.

    It accepts connections itself: event loops close those that arrive while the process has no descriptor left, or wait
    for a second. Before it closes its port, it accepts all who have connected.

    Args:
        context: of TLS; None for plain text.
        reserve: descriptors for the server's connections, to be refilled when one has been closed; None for some.
        make_room: closes connections that wait for their clients, when no descriptor is left for another one.
        options: of uvicorn.
    """

    def __init__(
        self,
        app: ASGIApp,
        context: ssl.SSLContext | None,
        *,
        reserve: Reserve | None = None,
        make_room: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        config = uvicorn.Config(
            app,
            interface="asgi3",
            ws="none",
            lifespan="off",
            backlog=BACKLOG,
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            **options,
        )
        config.load()
        super().__init__(config)
        self._reserve = reserve or Reserve()
        self._make_room = make_room
        self._listeners: list[socket.socket] = []
        self._accepted: set[asyncio.Task[None]] = set()
        self.handshakes: Handshakes | None = None
        if context is not None:
            self.handshakes = Handshakes(context, config.http_protocol_class, max_handshakes())
            config.http_protocol_class = self.handshakes  # type: ignore[assignment]  # uvicorn calls it only

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections. uvicorn calls it."""
        await super().startup([])
        self._listeners = sockets or []
        for listener in self._listeners:
            listener.setblocking(False)
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection = self._reserve.accept(listener)
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError:  # no descriptor, or no memory
                self._make_room()
                loop.remove_reader(listener)
                loop.call_later(_PAUSE_S, self._go_on, listener)
                break
            connection.setblocking(False)
            task = loop.create_task(self._connect(connection))
            self._accepted.add(task)
            task.add_done_callback(self._accepted.discard)
        self._reserve.refill()

    def _go_on(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._make_protocol, connection)
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError):  # else its client has disconnected meanwhile
                raise

    def _make_protocol(self) -> asyncio.Protocol:
        state, app_state = self.server_state, self.lifespan.state
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(config=self.config, server_state=state, app_state=app_state, _loop=asyncio.get_running_loop())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes requests, then closes all connections. uvicorn calls it when it should end."""
        await asyncio.gather(*map(stop_listening, sockets or []))
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            asyncio.get_running_loop().remove_reader(listener)
        if self._accepted:  # uvicorn tells those to end that are connected
            await asyncio.wait(self._accepted, timeout=_DRAIN_S)
        self._reserve.close()
        if self.handshakes is not None:
            self.handshakes.abort()
        await super().shutdown(sockets)


def server_sent_event(kind: str, data: object, identity: int | str | None = None) -> str:
    """Returns an event as a browser's EventSource reads it.

    https://html.spec.whatwg.org/multipage/server-sent-events.html

    Args:
        data: what JSON can hold.
        identity: the event's id, after which a client that connects again asks to go on.
    """
    name = "" if identity is None else f"id: {identity}\n"
    return f"{name}event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
