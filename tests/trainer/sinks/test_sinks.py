"""Metrics on disk: lines are kept, cut off after a checkpoint, and survive a full disk."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import fill
from trainer.errors import CheckpointError
from trainer.records.metrics import MetricsLog, read_metrics


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0, log=pytest.fail)
    log.write("step", step=1, epoch=1, loss=2.5)
    (line,) = read_metrics(tmp_path)
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"kind": "step", "step": 1, "epoch": 1, "loss": 2.5}
    log.close()


def test_a_resumed_run_removes_lines_after_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0, log=pytest.fail)
    for step in (50, 100, 150):
        log.write("step", step=step, epoch=1, loss=float(step))
    log.close()
    log = MetricsLog(tmp_path, from_step=100, log=pytest.fail)
    log.write("step", step=150, epoch=1, loss=-1.0)
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(50, 50.0), (100, 100.0), (150, -1.0)]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps({"kind": "step", "step": 1})
    (tmp_path / "metrics.jsonl").write_text(whole + "\n" + whole[:9])
    assert len(read_metrics(tmp_path)) == 1
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0, log=pytest.fail)
    log.write("epoch", step=45, epoch=1, val_accuracy=0.5)
    log.write("epoch", step=90, epoch=2, val_accuracy=0.75)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("epoch/val_accuracy")] == [(45, 0.5), (90, 0.75)]


def test_tensorboard_ignores_lines_that_a_resumed_run_removed(tmp_path: Path) -> None:
    for from_step, loss in ((0, 1.0), (100, -1.0)):
        log = MetricsLog(tmp_path, from_step=from_step, log=pytest.fail)
        for step in (from_step + 50, from_step + 100, from_step + 150):
            log.write("step", step=step, epoch=1, loss=loss)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("step/loss")]
    assert seen == [(50, 1.0), (100, 1.0), (150, -1.0), (200, -1.0), (250, -1.0)]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*/run/metrics\.jsonl: No such file"):
        MetricsLog(tmp_path / "run", from_step=0, log=pytest.fail)


def test_a_full_disk_is_one_warning_and_buffered_lines_are_written_once_there_is_room(small_disk: Path) -> None:
    printed: list[str] = []
    log = MetricsLog(small_disk, from_step=0, log=printed.append)
    log.write("step", step=1, epoch=1, loss=1.0)
    filler = fill(small_disk)
    for step in range(2, 400):
        log.write("step", step=step, epoch=1, loss=1.0)
    (warning,) = printed
    assert "cannot write the metrics" in warning
    assert "No space left on device; the training continues" in warning
    filler.unlink()
    log.write("step", step=400, epoch=1, loss=1.0)
    log.close()
    lines = read_metrics(small_disk)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert {1, 2, 3, 400} <= set(steps)  # whole lines are lost once the buffer is full
    events = EventAccumulator(str(small_disk / "tensorboard"))
    events.Reload()
    assert {1, 2, 3, 400} <= {event.step for event in events.Scalars("step/loss")}


def test_close_does_not_fail_on_a_full_disk(small_disk: Path) -> None:
    printed: list[str] = []
    log = MetricsLog(small_disk, from_step=0, log=printed.append)
    fill(small_disk)
    log.write("step", step=1, epoch=1, loss=1.0)
    log.close()
    assert len(printed) == 1
