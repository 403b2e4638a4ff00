"""A run is restored from its checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.loop.runs import SHORT, losses, make_run
from trainer.data import Dataset
from trainer.errors import CheckpointError
from trainer.loop.fit import fit
from trainer.loop.run import restore
from trainer.loop.saving import save
from trainer.signals import StopRequest


def test_checkpoints_of_a_changed_network_are_refused(mini: Dataset, tmp_path: Path) -> None:
    save(make_run(SHORT, mini, tmp_path / "run"))
    again = make_run(SHORT, mini, tmp_path / "run")
    again.learner.model.network.register_parameter("new", nn.Parameter(torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"of another network than lecture is now \(see network.new\)"):
        restore(again)


def test_a_run_continues_in_the_middle_of_an_epoch(mini: Dataset, tmp_path: Path) -> None:
    whole = make_run(SHORT, mini, tmp_path / "whole")
    with StopRequest() as stop:
        fit(whole, stop)
    first = make_run(SHORT, mini, tmp_path / "parts")
    losses(first, 30)  # the step that raised is not counted
    save(first)
    second = make_run(SHORT, mini, tmp_path / "parts")
    assert restore(second)
    assert second.state.step == first.state.step
    assert torch.equal(second.state.totals, first.state.totals)
