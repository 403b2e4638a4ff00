"""Following `metrics.jsonl` while a run writes it, and writes it anew after a restart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.service.progress import Progress


def write(folder: Path, *lines: dict[str, Any], end: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def step(number: int, epoch: int = 1) -> dict[str, Any]:
    return {"kind": "step", "step": number, "epoch": epoch, "train_loss": 1 / number}


def epoch(number: int) -> dict[str, Any]:
    return {"kind": "epoch", "step": 10 * number, "epoch": number, "val_accuracy": number / 10}


def test_each_line_is_read_once_and_of_steps_the_last_one(tmp_path: Path) -> None:
    progress, lines = Progress().advanced(tmp_path)
    assert lines == []
    write(tmp_path, step(1), step(2), step(10), epoch(1), end='{"kind": "st')
    progress, lines = progress.advanced(tmp_path)
    assert lines == [step(10), epoch(1)]
    assert (progress.step, progress.epoch) == (10, 1)
    assert (progress.figures["train_loss"], progress.figures["val_accuracy"]) == (0.1, 0.1)
    write(tmp_path, step(1), step(2), step(10), epoch(1), step(11, 2))
    progress, lines = Progress.from_json(json.loads(json.dumps(progress.to_json()))).advanced(tmp_path)
    assert lines == [step(11, 2)]
    assert progress.advanced(tmp_path) == (progress, [])


def test_a_long_training_gives_few_events_and_its_newest_figures(tmp_path: Path) -> None:
    progress, told = Progress(), []
    early, late = range(50, 1000, 50), range(100_000, 110_000, 50)
    for number in (*early, *late):
        write(tmp_path, step(number))
        progress, lines = replace(progress, offset=0).advanced(tmp_path)
        told += [line["step"] for line in lines]
        assert (progress.step, progress.figures["step"]) == (number, number)
    assert told[: len(early)] == list(early)
    assert 10 < len(told) - len(early) < 30
    write(tmp_path, step(1_000_000), step(1_000_050))
    _, lines = replace(progress, offset=0).advanced(tmp_path)
    assert [line["step"] for line in lines] == [1_000_050]


def test_steps_that_are_done_again_after_a_restart_are_no_news(tmp_path: Path) -> None:
    write(tmp_path, *(step(number) for number in range(1, 11)), epoch(1), step(15, 2))
    progress, _ = Progress().advanced(tmp_path)
    write(tmp_path, step(10), epoch(1), step(12, 2))  # a checkpoint of step 10
    progress, lines = progress.advanced(tmp_path)
    assert lines == []
    write(tmp_path, step(10), epoch(1), step(12, 2), step(16, 2), step(20, 2), epoch(2))
    assert progress.advanced(tmp_path)[1] == [step(20, 2), epoch(2)]


def test_lines_that_are_no_metrics_are_left_out(tmp_path: Path) -> None:
    wrong = ["no json", "[1]", '{"kind": "step"}', "[" * 100_000, json.dumps(epoch(1) | {"step": "x"})]
    nan = json.dumps(epoch(1) | {"val_accuracy": float("nan")})  # which JSON, and so a browser, does not have
    infinite = nan.replace("NaN", "1e999")
    (tmp_path / "metrics.jsonl").write_text("\n".join([*wrong, nan, infinite, ""]))
    assert Progress().advanced(tmp_path)[1] == [epoch(1) | {"val_accuracy": None}] * 2
