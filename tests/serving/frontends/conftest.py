"""Servers of a service that answers as the test wants, on each transport."""

import contextlib
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from serving.frontends import Frontend
from serving.frontends.grpcio import GrpcioFrontend, lane
from serving.frontends.native import NativeFrontend
from tests.serving.frontends.callers import LIMIT, Serve, wait_until
from tests.serving.frontends.fake_service import FakeService

TRANSPORTS = {"native": NativeFrontend, "grpcio": GrpcioFrontend, "grpcio-threads": GrpcioFrontend}


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture(params=TRANSPORTS)
def kind(request: pytest.FixtureRequest) -> Any:
    """Which transport: grpcio both with the lane and as it is where grpcio's inside is not what the lane knows."""
    return request.param


@pytest.fixture
def make(service: FakeService, kind: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Frontend]:
    """Makes transports of the service, not started."""
    if kind == "grpcio-threads":
        monkeypatch.setattr(lane, "cygrpc", types.SimpleNamespace())

    def make(**options: Any) -> Frontend:
        options = {"address": "127.0.0.1:0", "max_message_bytes": LIMIT} | options
        made: Frontend = TRANSPORTS[kind](service, **options)
        assert (getattr(made, "_lane", None) is not None) == (kind == "grpcio")
        return made

    return make


@pytest.fixture
def serve(make: Callable[..., Frontend]) -> Iterator[Serve]:
    """Starts transports; all of them end with the test, and with their threads."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Frontend:
            transport = make(**options)
            transport.start()
            stack.callback(transport.stop, 0)
            return transport

        yield start
    left = set(threading.enumerate()) - before
    assert [thread.name for thread in left if thread.name in ("native", "grpcio-infer")] == []


@pytest.fixture
def server(serve: Serve) -> Frontend:
    return serve()


@pytest.fixture
def channel(server: Frontend) -> Iterator[grpc.Channel]:
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
