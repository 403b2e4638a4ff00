"""Each gRPC front end, over services that a test controls."""

import contextlib
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from convoy import credentials
from serving.frontends import Frontend
from serving.frontends.grpcio import GrpcioFrontend, completion_queue
from serving.frontends.native import NativeFrontend
from tests.serving.frontends.callers import LIMIT, Serve, wait_until
from tests.serving.frontends.fake_service import FakeServices

FRONTENDS = {"native": NativeFrontend, "grpcio": GrpcioFrontend, "grpcio-threads": GrpcioFrontend}


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of credentials are looked at each time, not once a second."""
    monkeypatch.setattr(credentials, "CHECK_INTERVAL_S", 0.0)


@pytest.fixture
def services() -> FakeServices:
    return FakeServices()


@pytest.fixture(params=FRONTENDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """The kind of front end; grpcio with its completion queue, and with threads, as after a change of its interface."""
    return request.param


@pytest.fixture
def make(services: FakeServices, kind: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Frontend]:
    """Creates front ends that are not started."""
    if kind == "grpcio-threads":
        monkeypatch.setattr(completion_queue, "cygrpc", types.SimpleNamespace())

    def make(**options: Any) -> Frontend:
        options = {"address": "127.0.0.1:0", "max_message_bytes": LIMIT} | options
        made: Frontend = FRONTENDS[kind](services, **options)
        assert (getattr(made, "_queue", None) is not None) == (kind == "grpcio")
        return made

    return make


@pytest.fixture
def serve(make: Callable[..., Frontend]) -> Iterator[Serve]:
    """Starts front ends. They stop at the end of the test, and leave no thread behind."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Frontend:
            frontend = make(**options)
            frontend.start()
            stack.callback(frontend.stop, 0)
            return frontend

        yield start
    left = set(threading.enumerate()) - before
    assert [thread.name for thread in left if thread.name in ("native", "grpcio-calls")] == []


@pytest.fixture
def server(serve: Serve) -> Frontend:
    return serve()


@pytest.fixture
def channel(server: Frontend) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture
def log_entries(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[tuple[str, str]]]:
    """Waits for this number of entries in the access log; returns each entry's method and status."""
    caplog.set_level(logging.INFO, "serving.access")

    def wait(number: int) -> list[tuple[str, str]]:
        wait_until(lambda: len(caplog.records) >= number)
        found = [record.__dict__["fields"] for record in caplog.records]
        assert all(entry["peer"].startswith("ipv4:127.0.0.1:") and entry["seconds"] >= 0 for entry in found)
        return [(entry["method"], entry["status"]) for entry in found]

    return wait
