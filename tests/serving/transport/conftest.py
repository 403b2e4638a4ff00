"""Servers of a service that answers as the test wants, on each transport."""

import contextlib
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from serving.transport import Transport
from serving.transport.grpcio import GrpcioTransport, lane
from serving.transport.native import NativeTransport
from tests.serving.transport.callers import LIMIT, Serve, wait_until
from tests.serving.transport.fake_service import FakeService

TRANSPORTS = {"native": NativeTransport, "grpcio": GrpcioTransport, "grpcio-threads": GrpcioTransport}


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture(params=TRANSPORTS)
def kind(request: pytest.FixtureRequest) -> Any:
    """Which transport: grpcio both with the lane and as it is where grpcio's inside is not what the lane knows."""
    return request.param


@pytest.fixture
def make(service: FakeService, kind: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Transport]:
    """Makes transports of the service, not started."""
    if kind == "grpcio-threads":
        monkeypatch.setattr(lane, "cygrpc", types.SimpleNamespace())

    def make(**options: Any) -> Transport:
        options = {"address": "127.0.0.1:0", "max_message_bytes": LIMIT} | options
        made: Transport = TRANSPORTS[kind](service, **options)
        assert (getattr(made, "_lane", None) is not None) == (kind == "grpcio")
        return made

    return make


@pytest.fixture
def serve(make: Callable[..., Transport]) -> Iterator[Serve]:
    """Starts transports; all of them end with the test, and with their threads."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Transport:
            transport = make(**options)
            transport.start()
            stack.callback(transport.stop, 0)
            return transport

        yield start
    left = set(threading.enumerate()) - before
    assert [thread.name for thread in left if thread.name in ("native", "grpcio-infer")] == []


@pytest.fixture
def server(serve: Serve) -> Transport:
    return serve()


@pytest.fixture
def channel(server: Transport) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[tuple[str, str]]]:
    """Waits for so many lines in the access log: method and status of each."""
    caplog.set_level(logging.INFO, "serving.access")

    def wait(number: int) -> list[tuple[str, str]]:
        wait_until(lambda: len(caplog.records) >= number)
        found = [record.__dict__["fields"] for record in caplog.records]
        assert all(line["peer"].startswith("ipv4:127.0.0.1:") and line["seconds"] >= 0 for line in found)
        return [(line["method"], line["status"]) for line in found]

    return wait
