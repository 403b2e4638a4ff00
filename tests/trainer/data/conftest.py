"""Fixtures: a web server, and a list of logged lines."""

from collections.abc import Iterator

import pytest

from tests.trainer.data.faulty_server import FaultyServer


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer().running() as running:
        yield running


@pytest.fixture
def logged() -> list[str]:
    """Lines for the user: pass `logged.append`."""
    return []
