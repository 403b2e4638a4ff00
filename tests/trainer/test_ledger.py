"""Every look at a test set is written down; the same weights are one look."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.data import Dataset, ImageSet
from trainer.errors import CheckpointError
from trainer.evaluate import Evaluation
from trainer.ledger import Ledger, look_at_test_set


def entry(weights: str, dataset: str = "d1") -> dict[str, Any]:
    return {
        "dataset_sha256": dataset,
        "weights_sha256": weights,
        "accuracy": 0.9,
        "num_errors": 10,
        "num_images": 100,
    }


def test_looks_are_counted_for_each_test_set(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs" / "ledger.jsonl")
    assert ledger.record(entry("a")).number == 1
    assert ledger.record(entry("b")).number == 2
    assert ledger.record(entry("a", "d2")).number == 1
    repeated = ledger.record(entry("a"))
    assert repeated.is_repeated
    assert repeated.number == 1
    assert len(ledger.entries("d1")) == 2


def test_what_was_recorded_is_found_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.find("d1", "a") is None
    ledger.record(entry("a"))
    look = ledger.find("d1", "a")
    assert look is not None
    assert (look.accuracy, look.num_errors, look.is_repeated) == (0.9, 10, True)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(entry("a"))
    with ledger.path.open("a") as file:
        file.write("not json\n")
    with pytest.raises(CheckpointError, match="line 2"):
        ledger.record(entry("b"))


def test_runs_that_end_together_lose_no_look(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ThreadPoolExecutor(12) as pool:  # a lock on a file is the open file's, so that threads exclude each other too
        list(pool.map(lambda i: Ledger(path).record(entry(f"w{i}")), range(12)))
    assert {json.loads(line)["weights_sha256"] for line in path.read_text().splitlines()} == {
        f"w{i}" for i in range(12)
    }


def test_the_door_opens_the_test_images_and_writes_the_look(mini: Dataset, tmp_path: Path) -> None:
    def all_zeros(images: ImageSet) -> Evaluation:
        ones = torch.ones(len(images.labels))
        predicted = torch.zeros(len(images.labels), dtype=torch.int64)
        return Evaluation(labels=images.labels, predicted=predicted, confidence=ones, label_probability=ones, loss=0)

    ledger = Ledger(tmp_path / "ledger.jsonl")
    run = {"recipe": "r", "run": "x", "weights_sha256": "w", "config_sha256": "c"}
    images, _, look = look_at_test_set(ledger, mini, run, all_zeros, is_main=True)
    assert len(images.labels) == 1000
    assert look is not None
    assert look.num_errors == int((images.labels != 0).sum())
    (written,) = ledger.entries(mini.sha256)
    assert written.items() >= {**run, "dataset": "mnist-mini", "num_images": 1000}.items()
    assert written["time"].endswith("+00:00")
    _, _, look = look_at_test_set(ledger, mini, run, all_zeros, is_main=False)
    assert look is None
