"""A real HTTP server and real services, over models of one line of numpy each."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from serving.frontends.common.services import Services
from serving.frontends.http import HttpFrontend, HttpSettings
from tests.serving.fake_repository import FakeRepository, add_without_batch, echo, make_services, twice

MAX_BODY = 1 << 20
ANY_PORT = HttpSettings(host="127.0.0.1", port=0, metrics_port=0)

Start = Callable[..., HttpFrontend]


@pytest.fixture(scope="module")
def repository() -> Iterator[FakeRepository]:
    kinds = ("BOOL", "UINT8", "INT8", "INT64", "UINT64", "FP16", "FP32", "FP64", "BYTES")
    repository = FakeRepository(twice(), twice(version="3"), add_without_batch(), *map(echo, kinds))
    yield repository
    repository.close()


@pytest.fixture(scope="module")
def server(repository: FakeRepository) -> Iterator[HttpFrontend]:
    server = HttpFrontend(make_services(repository), ANY_PORT, max_message_bytes=MAX_BODY)
    server.start()
    yield server
    server.stop(5)


@pytest.fixture(scope="module")
def address(server: HttpFrontend) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
        yield client


@pytest.fixture
def own_services() -> Iterator[Services]:
    """Services for tests that change them."""
    repository = FakeRepository(twice())
    yield make_services(repository)
    repository.close()


@pytest.fixture
def start(own_services: Services) -> Iterator[Start]:
    """Starts servers, which stop at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(address: HttpSettings = ANY_PORT, **options: Any) -> HttpFrontend:
            server = HttpFrontend(own_services, address, max_message_bytes=MAX_BODY, **options)
            server.start()
            stack.callback(server.stop, 0)
            return server

        yield start
