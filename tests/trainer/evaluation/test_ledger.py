"""Every look at a test set is written down; the same weights are one look."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import files_of_at_most, fill
from trainer.data import Dataset, ImageSet, without_test_images
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.ledger import Ledger, images_sha256, look_at_test_set


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


def test_weights_seen_to_do_otherwise_are_another_look(tmp_path: Path) -> None:
    """The labels of some test images have been corrected."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record({**entry("a"), "test_sha256": "t"})
    look = ledger.record({**entry("a", "d2"), "test_sha256": "t", "num_errors": 9, "accuracy": 0.91})
    assert (look.number, look.num_errors, look.is_repeated) == (2, 9, False)


def test_what_was_recorded_is_found_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.find("d1", "a") is None
    ledger.record(entry("a"))
    look = ledger.find("d1", "a")
    assert look is not None
    assert (look.accuracy, look.num_errors, look.is_repeated) == (0.9, 10, True)


def test_a_line_that_was_changed_or_taken_out_is_noticed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for weights in "abc":
        ledger.record(entry(weights))
    first, second, third = ledger.path.read_text().splitlines(keepends=True)
    for forged in (first + third, first.replace("0.9", "0.99") + second + third, second + third):
        ledger.path.write_text(forged)
        with pytest.raises(CheckpointError, match="does not follow from the line before it"):
            ledger.record(entry("d"))
    ledger.path.write_text(first + second + third)
    assert ledger.record(entry("d")).number == 4


def test_a_last_line_that_was_changed_or_taken_out_is_noticed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for weights in "abc":
        ledger.record(entry(weights))
    first, second, third = ledger.path.read_text().splitlines(keepends=True)
    for forged in (first + second, first + second + third.replace("0.9", "0.99"), ""):
        ledger.path.write_text(forged)
        with pytest.raises(CheckpointError, match=r"does not end as ledger\.head says, at line 3"):
            ledger.record(entry("d"))
    ledger.path.write_text(first + second + third)
    assert ledger.record(entry("d")).number == 4


def test_the_head_may_be_behind_or_missing(tmp_path: Path) -> None:
    """A crash after the line, or a trainer from before the head: no look is lost, and the next one mends the head."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    head = tmp_path / "ledger.head"
    ledger.record(entry("a"))
    old = head.read_text()
    ledger.record(entry("b"))
    head.write_text(old)
    assert len(ledger.entries("d1")) == 2
    head.unlink()
    assert ledger.record(entry("c")).number == 3
    assert json.loads(head.read_text())["lines"] == 3
    head.write_text("{}")
    with pytest.raises(CheckpointError, match=r"ledger\.head is damaged"):
        ledger.entries("d1")


def test_looks_at_the_same_test_images_are_counted_through_every_data_set(tmp_path: Path) -> None:
    """One training photo more is another data set with the same test set."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.record(entry("a", "d1")).number == 1  # of a trainer that did not know the test images' digest yet
    assert ledger.record({**entry("b", "d1"), "test_sha256": "t"}).number == 2
    assert ledger.record({**entry("c", "d2"), "test_sha256": "t"}).number == 3
    assert ledger.record({**entry("d", "d3"), "test_sha256": "u"}).number == 1
    assert len(ledger.entries("d1")) == len(ledger.entries("d2")) == 3
    look = ledger.find("d2", "a")
    assert look is not None
    assert look.num_looks == 3


def test_a_ledger_from_before_the_chain_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_text(json.dumps(entry("a")) + "\n" + json.dumps(entry("b")) + "\n")
    assert ledger.record(entry("c")).number == 3
    assert len(ledger.entries("d1")) == 3
    with ledger.path.open("a") as file:
        file.write(json.dumps(entry("d")) + "\n")  # past the chain's beginning, a line without a link is a forgery
    with pytest.raises(CheckpointError, match="line 4"):
        ledger.entries("d1")


def test_seeds_of_a_setting_and_looks_by_data_set(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for seed, setting, dataset in ((0, "s", "d1"), (1, "s", "d1"), (2, "t", "d1"), (0, "s", "d2")):
        marks = {"seed": seed, "setting_sha256": setting, "dataset": "pets", "accuracy": seed / 10}
        ledger.record({**entry(f"{seed}{setting}{dataset}", dataset), **marks})
    assert [entry["seed"] for entry in ledger.of_setting("s")] == [0, 1, 0]
    assert ledger.looks_by_dataset() == {"pets d1": 3, "pets d2": 1}


def test_a_data_set_for_tuning_leads_to_no_test_images(mini: Dataset, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(ConfigError, match="handed out for tuning, without its test images"):
        look_at_test_set(ledger, without_test_images(mini), {}, lambda images: pytest.fail("seen"), is_main=True)
    assert not ledger.path.exists()


def test_a_full_disk_is_one_clear_error(small_disk: Path) -> None:
    ledger = Ledger(small_disk / "ledger.jsonl")
    filler = fill(small_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*/ledger\.jsonl: No space left on device"):
        ledger.record(entry("a"))
    filler.unlink()
    assert ledger.record(entry("a")).number == 1


def test_a_look_that_does_not_fit_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(entry("a"))
    before = ledger.path.read_bytes()
    with (
        files_of_at_most(len(before) + 20),
        pytest.raises(CheckpointError, match=r"cannot write .*ledger\.jsonl: File"),
    ):
        ledger.record(entry("b"))
    assert ledger.path.read_bytes() == before
    assert ledger.record(entry("b")).number == 2


def test_a_look_that_a_kill_has_cut_short_is_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(entry("a"))
    first = ledger.path.read_text()
    ledger.path.write_text(first + first[:40])
    assert ledger.looks_by_dataset() == {"? d1": 1}
    assert ledger.record(entry("b")).number == 2
    ledger.path.write_text(ledger.path.read_text()[:-2])  # but one that the head knows was whole
    with pytest.raises(CheckpointError, match=r"does not end as ledger\.head says, at line 2"):
        ledger.record(entry("c"))


@pytest.mark.parametrize("has_head", [True, False])
def test_an_editor_may_take_away_the_last_newline(tmp_path: Path, has_head: bool) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for weights in "ab":
        ledger.record(entry(weights))
    before = ledger.path.read_text()
    ledger.path.write_text(before[:-1])
    if not has_head:  # as after a kill before it, or of a trainer that knew none
        (tmp_path / "ledger.head").unlink()
    assert len(ledger.entries("d1")) == 2
    assert ledger.record(entry("b")).is_repeated
    with files_of_at_most(len(before) + 20), pytest.raises(CheckpointError, match="cannot write"):
        ledger.record(entry("c"))
    assert ledger.path.read_text() == before[:-1]
    assert ledger.record(entry("c")).number == 3
    assert ledger.path.read_text().startswith(before)
    assert len(ledger.entries("d1")) == 3


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
    assert written["test_sha256"] == images_sha256(images.images) != images_sha256(images.images[:-1])
    assert written["test_sha256"] == images_sha256(images.images.flip(0))  # files may be named anew
    _, _, look = look_at_test_set(ledger, mini, run, all_zeros, is_main=False)
    assert look is None
