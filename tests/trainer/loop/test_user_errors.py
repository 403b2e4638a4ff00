"""An error of the user's own network in the middle of a training is one line that names the file and the line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.loop.runs import ALONE, SHORT, make_run
from trainer.data import Dataset
from trainer.errors import ConfigError
from trainer.loop.fit import fit
from trainer.network_files import with_files
from trainer.ranks.failure import FailureContext, report_failure
from trainer.ranks.watchdog import Watchdog
from trainer.recipes import Recipe
from trainer.signals import StopRequest

NET = """
import torch
from torch import nn
from layer import Layer

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(784, num_classes)
        self.layer = Layer()

    def forward(self, images):
        return self.head(self.layer(images.flatten(1)))
"""
LAYER = """
from torch import nn

class Layer(nn.Module):
    calls = 0

    def forward(self, images):
        self.calls += self.training
        return images[:, :700] if self.calls > 3 else images
"""


def recipe_of(tmp_path: Path) -> Recipe:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "layer.py").write_text(LAYER)
    return with_files(replace(SHORT, network=f"{tmp_path / 'net.py'}:Net"))


def test_the_line_names_file_and_line_and_the_report_has_the_stack(mini: Dataset, tmp_path: Path) -> None:
    context = FailureContext(folder=tmp_path / "run")
    world = replace(ALONE, failure_context=context)
    run = make_run(recipe_of(tmp_path), mini, tmp_path / "run", world=world)
    report = report_failure(context, None, Watchdog(context, world.activity))
    with pytest.raises(ConfigError) as caught, report, StopRequest() as stop:
        fit(run, stop)
    text = str(caught.value)
    number = 1 + NET.splitlines().index("        return self.head(self.layer(images.flatten(1)))")
    assert text.startswith(f"{tmp_path / 'net.py'}, line {number}, in forward: RuntimeError: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in text
    assert text.endswith(f"; the whole stack is in {tmp_path / 'run' / 'failure.json'}")
    assert "\n" not in text
    written = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert written["message"] == text
    assert written["step"] == 3
    assert "linear.py" in written["traceback"]
    assert "trainer/loop/step.py" in written["traceback"]


def test_a_defect_of_convoy_is_not_blamed_on_the_user(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(recipe_of(tmp_path), mini, tmp_path / "run")

    def fail(batch: object) -> None:
        raise ZeroDivisionError("ours")

    run.learner = replace(run.learner, step=fail)  # type: ignore[arg-type]
    with StopRequest() as stop, pytest.raises(ZeroDivisionError):
        fit(run, stop)
