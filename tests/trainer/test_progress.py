"""Plain lines in a pipe, nothing from other ranks. tests/e2e shows the bar on a terminal."""

import os
import signal
import sys

import pytest

from convoy.processes import _Output
from trainer import progress as module
from trainer.errors import Interrupted
from trainer.progress import Progress, duration
from trainer.signals import StopRequest


def test_plain_lines_show_the_state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_LINE_INTERVAL_S", 0.0)
    with Progress(is_main=True) as progress:
        progress.start(step=0, num_steps=100)
        assert progress.is_due()
        progress.update(step=50, num_steps=100, epoch="1/2", loss=0.5, accuracy=0.875, rate=12345.6)
        progress.log("done")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1/2  step 50/100  loss 0.5000  accuracy 87.50 %  12,346 images/s  ")
    assert lines[0].endswith("s left")
    assert lines[1] == "done"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(is_main=False) as progress:
        progress.start(step=0, num_steps=10)
        progress.log("no")
        assert not progress.is_due()
    assert capsys.readouterr().out == ""


def test_a_terminal_that_closes_under_the_bar_asks_the_run_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich itself would end the process, without saving."""
    terminal, descriptor = os.openpty()
    with open(descriptor, "w") as file, StopRequest() as stop:
        stdout = _Output.instead_of(file)
        monkeypatch.setattr(sys, "stdout", stdout)
        progress = Progress(is_main=True, stop=stop)

        def work() -> None:
            with stop.deferred():
                progress.start(step=0, num_steps=10)
                os.close(terminal)
                progress.log("epoch 1")
                assert stop.signal_number == signal.SIGPIPE
                progress.log("discarded")
                progress.stop()

        with pytest.raises(Interrupted, match=r"cannot write the output \(Input/output error\)"):
            work()
        assert sys.stdout is stdout  # not rich's any more


def test_durations_have_one_unit() -> None:
    assert [duration(seconds) for seconds in (0.2, 119, 120, 7200, 200_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
