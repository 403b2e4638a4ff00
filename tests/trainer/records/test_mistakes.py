"""Tests of the mistakes that a run keeps for a page."""

import base64
from pathlib import Path

import numpy as np
import pytest

from trainer.records.mistakes import MAX_EPOCHS, MAX_SIZE, NUM_KEPT, Mistake, is_kept, read_mistakes, write_mistakes


def mistake(*shape: int) -> Mistake:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    return Mistake(pixels=pixels, label="<b>", predicted="dog", confidence=0.98765)


def test_what_is_written_is_read_by_epoch(tmp_path: Path) -> None:
    assert read_mistakes(tmp_path) == []
    write_mistakes(tmp_path, 10, [mistake(2, 3)])
    write_mistakes(tmp_path, 9, [mistake(1, 2, 3)])
    write_mistakes(tmp_path, 11, [])
    (tmp_path / "mistakes/000012.json").write_text("half")
    first, second, third = read_mistakes(tmp_path)
    assert [first["epoch"], second["epoch"], third["epoch"]] == [9, 10, 11]
    (colour,), (grey,) = first["mistakes"], second["mistakes"]
    assert {name: grey[name] for name in ("label", "predicted", "confidence")} == {
        "label": "<b>",
        "predicted": "dog",
        "confidence": 0.9877,
    }
    assert [base64.b64decode(grey["pixels"]), grey["channels"], grey["height"], grey["width"]] == [
        bytes(range(6)),
        1,
        2,
        3,
    ]
    assert list(base64.b64decode(colour["pixels"])) == [0, 3, 1, 4, 2, 5]  # channel by channel


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    write_mistakes(tmp_path, 1, [mistake(300, 224, 3)] * 50)
    (epoch,) = read_mistakes(tmp_path)
    assert len(epoch["mistakes"]) == NUM_KEPT
    assert max(epoch["mistakes"][0]["height"], epoch["mistakes"][0]["width"]) <= MAX_SIZE
    assert (tmp_path / "mistakes/000001.json").stat().st_size < 200_000


@pytest.mark.parametrize("num_epochs", [1, 2, 32, 33, 1000])
def test_some_epochs_of_a_long_run_are_kept_and_always_the_last(num_epochs: int) -> None:
    kept = [epoch for epoch in range(1, num_epochs + 1) if is_kept(epoch, num_epochs)]
    assert kept[-1] == num_epochs
    assert len(kept) == num_epochs if num_epochs <= MAX_EPOCHS else MAX_EPOCHS // 2 < len(kept) <= MAX_EPOCHS + 1
