"""The collector does not look through what is imported, and goes on afterwards."""

import gc
import importlib
import weakref
from pathlib import Path

import pytest

from trainer.collector import lasting_imports, paused_collector


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def unfrozen() -> None:
    """Nothing that another test has frozen counts here."""
    gc.unfreeze()


def searches() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_a_paused_collector_searches_nothing_and_goes_on() -> None:
    with paused_collector():
        before = searches()
        cycles = [Cycle() for _ in range(10_000)]
        last = weakref.ref(cycles[-1])
        del cycles
        assert searches() == before
        assert last() is not None
    gc.collect()
    assert gc.isenabled()
    assert last() is None


def test_a_collector_that_was_off_stays_off_even_after_an_error() -> None:
    gc.disable()
    try:
        with pytest.raises(OSError), paused_collector():  # noqa: PT011 (any)
            raise OSError
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_imports_are_not_looked_through_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large_package.py").write_text("objects = [[number] for number in range(50_000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with lasting_imports():
        before = searches()
        package = importlib.import_module("large_package")
        assert searches() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(package.objects)
    assert all(each is not package.objects for each in gc.get_objects())
