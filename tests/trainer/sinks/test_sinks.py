"""Sinks in the run folder: lines are kept, cut off after a checkpoint, and survive a full disk; TensorBoard's pages."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.conftest import fill
from tests.trainer.sinks.sink_runs import COLOUR, GREY, opened, run_folder, write_epochs
from trainer.errors import CheckpointError
from trainer.records.metrics import read_metrics
from trainer.sinks import open_sinks
from trainer.sinks.tensorboard import TensorBoardSink


def events_of(folder: Path) -> Any:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        sinks.write("step", step=1, epoch=1, loss=2.5)
        (line,) = read_metrics(tmp_path)
        assert abs(line.pop("time") - time.time()) < 60
        assert line == {"kind": "step", "step": 1, "epoch": 1, "loss": 2.5, "num_steps": 450}


def test_a_resumed_run_removes_lines_after_its_checkpoint(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        for step in (50, 100, 150):
            sinks.write("step", step=step, epoch=1, loss=float(step))
    with opened(tmp_path, from_step=100) as sinks:
        sinks.write("step", step=150, epoch=1, loss=-1.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(50, 50.0), (100, 100.0), (150, -1.0)]


def test_a_run_that_was_killed_after_its_evaluation_has_one_result(tmp_path: Path) -> None:
    for _ in range(2):
        with opened(tmp_path, from_step=450) as sinks:
            sinks.write("result", step=450, epoch=10, test_accuracy=0.9)
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["result"]


@pytest.mark.parametrize(
    "damage", ['{"kind": "st', "5", "[]", "{}", '{"kind": "step", "step": "2", "epoch": 1}', "\0\0"]
)
def test_damaged_lines_are_left_out(tmp_path: Path, damage: str) -> None:
    whole = [json.dumps({"kind": "step", "step": step, "epoch": 1}) for step in (1, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([whole[0], damage, whole[1], damage]))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    with opened(tmp_path, from_step=3):
        pass
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole
    assert read_metrics(tmp_path / "nowhere") == []


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    with open_sinks(run_folder(tmp_path), ("wandb",), steps=(0, 450), is_main=False, log=pytest.fail) as sinks:
        write_epochs(sinks, 1)
        sinks.show_mistakes([GREY], step=45)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_draws_training_and_validation_in_one_chart(tmp_path: Path) -> None:
    """It does so for one tag in two folders."""
    with opened(tmp_path) as sinks:
        write_epochs(sinks, 1, 2)
    train, validation = (events_of(tmp_path / "tensorboard" / name) for name in ("train", "validation"))
    assert [(event.step, event.value) for event in train.Scalars("epoch/loss")] == [(45, 1.0), (90, 1.0)]
    assert [(event.step, event.value) for event in validation.Scalars("epoch/loss")] == [(45, 2.0), (90, 2.0)]
    assert [event.value for event in validation.Scalars("epoch/accuracy")] == [0.125, 0.25]


def test_tensorboard_has_hyper_parameters_and_images_of_mistakes(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        sinks.write("result", step=90, epoch=2, val_accuracy=0.5, test_accuracy=0.25)
        sinks.show_mistakes([GREY, COLOUR], step=90)
    events = events_of(tmp_path / "tensorboard")
    assert events.Tags()["images"] == [
        "mistakes/01: cat, taken for dog (90 %)",
        "mistakes/02: ä/b, taken for <c> (50 %)",
    ]
    first, second = (events.Images(tag)[0] for tag in events.Tags()["images"])
    assert (first.height, first.width, second.encoded_image_string[:4]) == (8, 6, b"\x89PNG")
    assert events.Scalars("test/accuracy")[0].value == 0.25
    content = events.PluginTagToContent("hparams")
    started = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert started.hparams["recipe.augment.shift"].number_value == 2
    assert started.hparams["recipe.widths"].string_value == "[16, 32, 32, 64]"
    assert started.hparams["seed"].number_value == 3
    assert "_hparams_/session_end_info" in content


def test_tensorboard_ignores_lines_that_a_resumed_run_removed(tmp_path: Path) -> None:
    for from_step, loss in ((0, 1.0), (100, -1.0)):
        with opened(tmp_path, from_step=from_step) as sinks:
            for step in (from_step + 50, from_step + 100, from_step + 150):
                sinks.write("step", step=step, epoch=1, loss=loss)
    seen = [(event.step, event.value) for event in events_of(tmp_path / "tensorboard").Scalars("step/loss")]
    assert seen == [(50, 1.0), (100, 1.0), (150, -1.0), (200, -1.0), (250, -1.0)]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    refused = pytest.raises(CheckpointError, match=r"cannot write .*/run/metrics\.jsonl: No such file")
    with refused, opened(tmp_path / "run"):
        pass


def test_a_full_disk_is_one_warning_and_buffered_lines_are_written_once_there_is_room(small_disk: Path) -> None:
    printed: list[str] = []
    with opened(small_disk, log=printed.append) as sinks:
        sinks.write("step", step=1, epoch=1, loss=1.0)
        filler = fill(small_disk)
        for step in range(2, 400):
            sinks.write("step", step=step, epoch=1, loss=1.0)
        (warning,) = printed
        assert "cannot write the metrics" in warning
        assert "No space left on device; the training continues" in warning
        filler.unlink()
        sinks.write("step", step=400, epoch=1, loss=1.0)
    lines = read_metrics(small_disk)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert {1, 2, 3, 400} <= set(steps)  # whole lines are lost once the buffer is full
    events = events_of(small_disk / "tensorboard")
    assert {1, 2, 3, 400} <= {event.step for event in events.Scalars("step/loss")}


def test_the_end_does_not_fail_on_a_full_disk(small_disk: Path) -> None:
    printed: list[str] = []
    with opened(small_disk, log=printed.append) as sinks:
        fill(small_disk)
        sinks.write("step", step=1, epoch=1, loss=1.0)
    assert len(printed) == 1


def test_an_error_of_tensorboard_is_one_warning_and_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such tag")

    monkeypatch.setattr(TensorBoardSink, "write", refuse)
    printed: list[str] = []
    with opened(tmp_path, log=printed.append) as sinks:
        write_epochs(sinks, 1, 2)
    (warning,) = printed
    assert warning.startswith(f"warning: cannot write the metrics in {tmp_path}: no such tag; the training continues")
    assert len(read_metrics(tmp_path)) == 2
