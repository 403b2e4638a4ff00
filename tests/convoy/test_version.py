"""The version is that of the installed package, and no error where there is none."""

import importlib.metadata
import tomllib

import pytest

from convoy.version import convoy_version
from tests.conftest import ROOT


def test_the_version_is_the_packages() -> None:
    assert convoy_version() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_a_copy_of_the_repository_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server, its page and the training service ask for it when they start."""

    def no_distribution(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", no_distribution)
    assert convoy_version() == "unknown"
