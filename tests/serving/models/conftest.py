"""Faults of the file system, for every test of this folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Error numbers by path: looking at such a file, or into such a folder, fails as on a broken disk or mount."""
    numbers: dict[Path, int] = {}

    def fail_if_broken(path: Any) -> None:
        number = numbers.get(Path(path)) if isinstance(path, str | Path) else None
        if number is not None:
            raise OSError(number, os.strerror(number), str(path))

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            fail_if_broken(path)
            return function(path, *arguments, **options)

        return call

    for name in ("scandir", "stat", "lstat"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    monkeypatch.setattr("io.open", checked(open))
    return numbers
