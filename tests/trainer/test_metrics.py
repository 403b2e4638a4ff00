"""Lines that stay, lines that a resumed run writes anew."""

import json
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.metrics import MetricsLog, read_metrics


def test_lines_are_there_as_soon_as_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0)
    log.write("step", step=1, epoch=1, loss=2.5)
    (line,) = read_metrics(tmp_path)
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"kind": "step", "step": 1, "epoch": 1, "loss": 2.5}
    log.close()


def test_a_resumed_run_drops_what_lies_after_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0)
    for step in (50, 100, 150):
        log.write("step", step=step, epoch=1, loss=float(step))
    log.close()
    log = MetricsLog(tmp_path, from_step=100)
    log.write("step", step=150, epoch=1, loss=-1.0)
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(50, 50.0), (100, 100.0), (150, -1.0)]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps({"kind": "step", "step": 1})
    (tmp_path / "metrics.jsonl").write_text(whole + "\n" + whole[:9])
    assert len(read_metrics(tmp_path)) == 1
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0)
    log.write("epoch", step=45, epoch=1, val_accuracy=0.5)
    log.write("epoch", step=90, epoch=2, val_accuracy=0.75)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("epoch/val_accuracy")] == [(45, 0.5), (90, 0.75)]
