"""Connections of the REST API that send no request."""

import asyncio
import socket

import pytest
from starlette.applications import Starlette

from trainer.service.rest import server
from trainer.service.rest.server import RestServer


def test_a_request_that_is_no_http_leaves_nothing_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def connect() -> None:
        rest = RestServer(Starlette(), "127.0.0.1", 0, None)
        await rest.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", rest.port)
        writer.write(b"\0nonsense\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 400 ")
        writer.close()
        await rest.stop(1)

    asyncio.run(connect())
    assert caplog.records == []


def test_a_client_that_sends_no_request_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)

    async def connect() -> None:
        rest = RestServer(Starlette(), "127.0.0.1", 0, None)
        await rest.start()
        assert rest._listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1  # as its connections then have it
        for sent in (b"", b"GET / HTTP/1.1\r\nhost: x\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", rest.port)
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", rest.port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\nNot Found"), 5)
            await asyncio.sleep(0.3)  # the connection is kept for further requests
        writer.close()
        await rest.stop(1)

    asyncio.run(connect())
