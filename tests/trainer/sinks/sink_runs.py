"""Runs whose sinks the tests open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import LogTo
from trainer.recipes import RECIPES
from trainer.records.fingerprint import Fingerprint
from trainer.records.run_folder import RunFolder
from trainer.sinks import Mistake, Sinks, open_sinks

GREY = Mistake(pixels=np.full((8, 6), 7, dtype=np.uint8), label="cat", predicted="dog", confidence=0.9)
COLOUR = Mistake(pixels=np.full((8, 6, 3), 7, dtype=np.uint8), label="ä/b", predicted="<c>", confidence=0.5)


def run_folder(path: Path) -> RunFolder:
    known: dict[str, Any] = {"image_size": None, "dataset_sha256": "d" * 64, "virtual_shards": None}
    return RunFolder(path, Fingerprint.of(RECIPES["mnist-fast"], seed=3, **known))


@contextmanager
def opened(
    path: Path, *services: LogTo, from_step: int = 0, log: Callable[[str], None] = pytest.fail
) -> Iterator[Sinks]:
    """Opens the sinks of a run; a warning fails the test unless `log` takes it."""
    with open_sinks(run_folder(path), services, steps=(from_step, 450), is_main=True, log=log) as sinks:
        yield sinks


def write_epochs(sinks: Sinks, *epochs: int) -> None:
    """Writes the metrics of epochs of 45 steps; the validation accuracy is the epoch's number / 8."""
    for epoch in epochs:
        sinks.write("epoch", step=45 * epoch, epoch=epoch, train_loss=1.0, val_loss=2.0, val_accuracy=epoch / 8)
