"""A server and a list of said lines for each test that asks."""

from collections.abc import Iterator

import pytest
from tiny_set import FaultyServer


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer().running() as running:
        yield running


@pytest.fixture
def said() -> list[str]:
    """Lines for the user: pass `said.append`."""
    return []
