"""Tests of what a watcher sees of a run's folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.watch.fake_run import FakeRun
from trainer.errors import ConfigError
from trainer.files import write_atomically
from trainer.watch.run import State, WatchedRun
from trainer.watch.terminal import describe_end


def test_lines_come_as_they_are_written(tmp_path: Path) -> None:
    written = FakeRun(tmp_path / "run")
    with written.training():
        run = WatchedRun.open(written.path)
        assert (run.state, run.lines, run.num_steps, run.step) == (State.RUNNING, [], None, 0)
        written.write_text('{"kind": "step", "step": 20, "epoch": 1, "loss": 2')
        run.refresh()
        assert run.lines == []
        written.write_text('.5, "images_per_second": 7, "num_steps": 120}\nnonsense\n[1]\n')
        run.refresh()
        assert [line["loss"] for line in run.lines] == [2.5]
        assert (run.num_steps, run.images_per_second, run.seconds_left) == (120, 7.0, None)
        written.end_epoch(1)
        run.refresh()
        assert [line["kind"] for line in run.lines] == ["step", "epoch"]
        assert run.newest("epoch", "val_accuracy") == 0.1
        assert run.newest("result", "test_accuracy") is None
        written.finish()
        run.refresh()
        assert [line["kind"] for line in run.lines] == ["step", "epoch", "result"]
    assert run.state is State.FINISHED


def test_without_lines_of_steps_the_epochs_tell_the_length_and_the_speed(tmp_path: Path) -> None:
    written = FakeRun(tmp_path / "run", epochs=10)
    for epoch in (1, 2):
        written.end_epoch(epoch)
    run = WatchedRun.open(written.path)
    assert (run.num_steps, run.images_per_second, run.seconds_left) == (450, 4500.0, 360.0)


def test_a_run_that_goes_on_from_a_checkpoint_writes_its_metrics_anew(tmp_path: Path) -> None:
    written = FakeRun(tmp_path / "run")
    for epoch in (1, 2):
        written.end_epoch(epoch)
    run = WatchedRun.open(written.path)
    metrics = written.path / "metrics.jsonl"
    write_atomically(metrics, metrics.read_bytes().splitlines(keepends=True)[0])
    written.end_epoch(2)
    run.refresh()
    assert [line["epoch"] for line in run.lines] == [1, 2]


def test_a_run_that_no_process_trains_has_stopped_or_failed(tmp_path: Path) -> None:
    written = FakeRun(tmp_path / "run")
    written.end_epoch(1)
    assert WatchedRun.open(written.path).state is State.STOPPED
    written.fail("the loss is nan at step 7\nand more")
    os.utime(written.path / "metrics.jsonl", (1, 1))
    run = WatchedRun.open(written.path)
    assert (run.state, run.reason) == (State.FAILED, "the loss is nan at step 7")
    with written.training():  # again
        assert WatchedRun.open(written.path).state is State.RUNNING
    (written.path / "metrics.jsonl").touch()
    assert WatchedRun.open(written.path).state is State.STOPPED  # the failure was before it


def test_an_interrupted_run_has_the_step_that_it_saved(tmp_path: Path) -> None:
    written = FakeRun(tmp_path / "run")
    assert describe_end(WatchedRun.open(written.path)).startswith("stopped at step 0: ")
    for name in ("step-00000002", "step-00000001", ".step-00000003.tmp"):
        (written.path / "checkpoints" / name).mkdir(parents=True)
    assert describe_end(WatchedRun.open(written.path)).startswith("stopped at step 2: the same command")


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run does not exist \(yet\): give the folder"):
        WatchedRun.open(tmp_path / "run")
    (tmp_path / "ledger.jsonl").touch()  # lies beside the runs
    with pytest.raises(ConfigError, match=r"ledger.jsonl is a file: give the folder of a run"):
        WatchedRun.open(tmp_path / "ledger.jsonl")
    for content in ("", "[]", "{}", json.dumps({"fingerprint": 3})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match="holds no run"):
            WatchedRun.open(tmp_path)


def test_watching_imports_no_torch() -> None:
    code = "import sys, trainer.watch; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
