"""Tests of what a run's model is said to be, before it is exported."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer.augmentation import Square
from trainer.export.plan import repository_model
from trainer.loop.run import Run


@pytest.mark.parametrize(
    ("dataset", "square", "method"),
    [
        ("folder:/data/tools", "crop", "fit"),
        ("folder:/data/tools", "pad", "pad"),
        ("mnist", "pad", "mnist"),  # its images are squares
    ],
)
def test_clients_prepare_files_as_the_run_did(dataset: str, square: Square, method: str) -> None:
    images: Any = SimpleNamespace(shape=(3, 8, 8))
    data = SimpleNamespace(name=dataset, train=images, classes=("a", "b"), significant_bits=None)
    run = cast(Run, SimpleNamespace(dataset=data, recipe=SimpleNamespace(square=square)))
    assert repository_model(run, Path("models"), "tools").preprocessing == method
