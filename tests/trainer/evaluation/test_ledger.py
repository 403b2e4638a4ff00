"""Every evaluation on a test set is recorded, the same weights once, and ledgers merge by concatenation."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import files_of_at_most, fill
from trainer.data import Dataset, ImageSet, without_test_images
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.entry import EvaluatedWeights, LedgerEntry
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.ledger import Ledger, evaluate_and_record, images_sha256

WEIGHTS = EvaluatedWeights(recipe="r", run="x", seed=0, weights_sha256="w", config_sha256="c", setting_sha256="s")


def entry(weights: str, dataset_sha256: str = "d1", **changes: Any) -> LedgerEntry:
    """An evaluation with 10 errors of 100."""
    ten_errors = LedgerEntry(
        dataset_sha256=dataset_sha256, weights_sha256=weights, accuracy=0.9, num_errors=10, num_images=100
    )
    return replace(ten_errors, **changes)


def test_evaluations_are_counted_for_each_test_set(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs" / "ledger.jsonl")
    assert ledger.record(entry("a")).number == 1
    assert ledger.record(entry("b")).number == 2
    assert ledger.record(entry("a", "d2")).number == 1
    repeated = ledger.record(entry("a"))
    assert repeated.is_repeated
    assert repeated.number == 1
    assert len(ledger.entries("d1")) == 2


def test_the_same_weights_count_again_after_a_correction_of_labels(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(entry("a", test_sha256="t"))
    recorded = ledger.record(entry("a", "d2", test_sha256="t", num_errors=9, accuracy=0.91))
    assert (recorded.number, recorded.entry.num_errors, recorded.is_repeated) == (2, 9, False)


def test_find_returns_a_recorded_evaluation(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.find("d1", "a", "one") is None
    ledger.record(entry("a"))
    found = ledger.find("d1", "a", "one")
    assert found is not None
    assert (found.entry.accuracy, found.entry.num_errors, found.is_repeated) == (0.9, 10, True)
    text = found.describe(ledger.path, views="one", recall_by_class={"a": 0.95, "b": 0.5})
    assert text.startswith("90.00 % (10 of 100 wrong; interval 81.")
    assert text.endswith(
        "95 % over all evaluations), balanced accuracy 72.50 % (worst class: 'b', recall 50.00 %), "
        f"evaluation 1 of 1 on this test set in {ledger.path}"
    )


def test_both_figures_of_a_recipe_with_views_are_one_entry(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    both = entry("a", num_errors_with_views=8, accuracy_with_views=0.92)
    assert ledger.record(both).number == 1
    assert ledger.record(both).is_repeated
    assert ledger.entries("d1") == [both]
    found = ledger.find("d1", "a", "shifted")
    assert found is not None
    assert (found.entry.num_errors, found.entry.num_errors_with_views) == (10, 8)
    assert "), 92.00 % with 5 views of each image (8 wrong), evaluation 1 of 1" in found.describe(
        ledger.path, views="shifted", recall_by_class={}
    )


def test_an_average_over_views_of_version_0_1_is_no_evaluation_of_one_view(tmp_path: Path) -> None:
    """The same weights may be evaluated on one view too, which is a further evaluation, and from then on counts."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    old = entry("a", num_errors=8, accuracy=0.92, setting_sha256="s")
    ledger.record(old)
    assert ledger.find("d1", "a", "shifted") is None
    assert ledger.find("d1", "a", "one") is not None
    assert ledger.of_setting("s") == [old]
    new = entry("a", num_errors_with_views=8, accuracy_with_views=0.92, setting_sha256="s")
    assert ledger.record(new).number == 2
    found = ledger.find("d1", "a", "shifted")
    assert found is not None
    assert (found.number, found.entry.num_errors) == (2, 10)
    assert ledger.of_setting("s") == [new]
    assert len(ledger.entries("d1")) == 2


def test_a_changed_line_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for weights in "abc":
        ledger.record(entry(weights))
    lines = ledger.path.read_text()
    first, second, third = lines.splitlines(keepends=True)
    ledger.path.write_text(first + second.replace("0.9", "0.99") + third)
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl, line 2, was changed after it was written"):
        ledger.record(entry("d"))
    ledger.path.write_text(lines)
    assert ledger.record(entry("d")).number == 4


TEXT = '{"dataset_sha256": "d1", "weights_sha256": "b", "accuracy": "high", "num_errors": 1, "num_images": 9}'


@pytest.mark.parametrize("line", ["not json", "[]", '{"dataset_sha256": "d1"}', '{"a": 1}{"b": 2}', TEXT])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(entry("a"))
    with ledger.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl, line 2, is not"):
        ledger.record(entry("b"))


def test_bytes_that_are_no_text_are_damage_and_a_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    with pytest.raises(CheckpointError, match="bytes is damaged: 'utf-8' codec"):
        Ledger(tmp_path / "bytes").all_entries()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*folder: Is a directory"):
        Ledger(tmp_path / "folder").all_entries()


def timed(weights: str, hour: int, **changes: Any) -> LedgerEntry:
    return replace(entry(weights), time=f"2026-11-26T{hour:02}:00:00.000000+00:00", test_sha256="t", **changes)


@pytest.fixture
def two_ledgers(tmp_path: Path) -> tuple[str, str]:
    """The ledgers of two machines: `both` has the same weights on each; the second knows other training images, too."""
    contents = []
    for name, entries in (
        ("one", [timed("a", 1), timed("both", 3), timed("c", 5)]),
        ("other", [timed("b", 2, dataset_sha256="d2"), timed("both", 4), timed("d", 6)]),
    ):
        ledger = Ledger(tmp_path / f"{name}.jsonl")
        for each in entries:
            ledger.record(replace(each, setting_sha256="s", dataset="pets"))
        contents.append(ledger.path.read_text())
    return contents[0], contents[1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0), (1, 1, 0)])
def test_ledgers_merge_by_concatenation(tmp_path: Path, two_ledgers: tuple[str, str], order: tuple[int, ...]) -> None:
    """The order of the files and repetitions do not matter: entries are sorted by time, and duplicates count once."""
    merged = Ledger(tmp_path / "merged.jsonl")
    merged.path.write_text("".join(two_ledgers[number] for number in order))
    assert [each.weights_sha256 for each in merged.entries("d1")] == ["a", "b", "both", "c", "d"]
    assert [each.weights_sha256 for each in merged.of_setting("s")] == ["a", "b", "both", "c", "d"]
    assert merged.counts_by_dataset() == {"pets d1": 4, "pets d2": 1}
    both = merged.find("d1", "both", "one")
    assert both is not None
    assert (both.number, both.num_evaluations) == (3, 5)
    assert merged.record(timed("d", 7)).is_repeated
    assert merged.record(timed("e", 7)).number == 6


def test_blank_lines_between_merged_ledgers_are_ignored(tmp_path: Path, two_ledgers: tuple[str, str]) -> None:
    merged = Ledger(tmp_path / "merged.jsonl")
    merged.path.write_text("\n\n".join(two_ledgers))
    assert len(merged.entries("d1")) == 5


def test_a_ledger_with_a_chain_and_a_head_file_is_continued(tmp_path: Path) -> None:
    """Ledgers of 0.1 link each line to the one before and have the last digest in `ledger.head`; older ones do not."""
    ledger, head = Ledger(tmp_path / "ledger.jsonl"), tmp_path / "ledger.head"
    seen = {"dataset_sha256": "d1", "accuracy": 0.9, "num_errors": 10, "num_images": 100}
    old = [{"weights_sha256": "a"}, {"weights_sha256": "b", "previous": "1"}, {"weights_sha256": "c", "previous": "2"}]
    lines = "".join(json.dumps(seen | each) + "\n" for each in old)
    ledger.path.write_text(lines)
    head.write_text('{"lines": 3, "sha256": "no more of interest"}')
    assert [each.weights_sha256 for each in ledger.entries("d1")] == ["a", "b", "c"]
    assert ledger.record(entry("d")).number == 4
    assert ledger.path.read_text().startswith(lines)
    assert head.exists()


def test_evaluations_on_the_same_test_images_count_through_every_data_set(tmp_path: Path) -> None:
    """One training photo more is another data set with the same test set."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.record(entry("a", "d1")).number == 1  # an old entry, without a digest of the test images
    assert ledger.record(entry("b", "d1", test_sha256="t")).number == 2
    assert ledger.record(entry("c", "d2", test_sha256="t")).number == 3
    assert ledger.record(entry("d", "d3", test_sha256="u")).number == 1
    assert len(ledger.entries("d1")) == len(ledger.entries("d2")) == 3
    found = ledger.find("d2", "a", "one")
    assert found is not None
    assert found.num_evaluations == 3


def test_seeds_of_a_setting_and_counts_by_data_set(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for seed, setting, dataset in ((0, "s", "d1"), (1, "s", "d1"), (2, "t", "d1"), (0, "s", "d2")):
        of_run = {"seed": seed, "setting_sha256": setting, "dataset": "pets", "accuracy": seed / 10}
        ledger.record(entry(f"{seed}{setting}{dataset}", dataset, **of_run))
    assert [entry.seed for entry in ledger.of_setting("s")] == [0, 1, 0]
    assert ledger.counts_by_dataset() == {"pets d1": 3, "pets d2": 1}


def test_a_data_set_for_tuning_has_no_test_images(mini: Dataset, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(ConfigError, match="opened for tuning, without its test images"):
        evaluate_and_record(ledger, without_test_images(mini), WEIGHTS, pytest.fail, is_main=True)
    assert not ledger.path.exists()


def test_a_full_disk_is_one_clear_error(small_disk: Path) -> None:
    ledger = Ledger(small_disk / "ledger.jsonl")
    filler = fill(small_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*/ledger\.jsonl: No space left on device"):
        ledger.record(entry("a"))
    filler.unlink()
    assert ledger.record(entry("a")).number == 1


def test_an_entry_that_does_not_fit_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
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


def test_an_entry_that_a_kill_has_cut_short_is_ignored(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(entry("a"))
    first = ledger.path.read_text()
    ledger.path.write_text(first + first[:40])
    assert ledger.counts_by_dataset() == {"? d1": 1}
    assert ledger.record(entry("b")).number == 2
    assert len(ledger.path.read_text().splitlines()) == 2


def test_an_editor_may_remove_the_last_newline(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for weights in "ab":
        ledger.record(entry(weights))
    before = ledger.path.read_text()
    ledger.path.write_text(before[:-1])
    assert len(ledger.entries("d1")) == 2
    assert ledger.record(entry("b")).is_repeated
    with files_of_at_most(len(before) + 20), pytest.raises(CheckpointError, match="cannot write"):
        ledger.record(entry("c"))
    assert ledger.path.read_text() == before[:-1]
    assert ledger.record(entry("c")).number == 3
    assert ledger.path.read_text().startswith(before)
    assert len(ledger.entries("d1")) == 3


def test_names_that_are_not_utf8_are_recorded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(entry("a", dataset="folder:\udcff"))
    assert ledger.counts_by_dataset() == {"folder:\udcff d1": 1}


def test_runs_that_end_together_lose_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ThreadPoolExecutor(12) as pool:  # each opens the file, so that the lock keeps threads out, too
        list(pool.map(lambda i: Ledger(path).record(entry(f"w{i}")), range(12)))
    assert {json.loads(line)["weights_sha256"] for line in path.read_text().splitlines()} == {
        f"w{i}" for i in range(12)
    }


def test_an_evaluation_is_recorded_with_the_digest_of_the_test_images(mini: Dataset, tmp_path: Path) -> None:
    def all_zeros(images: ImageSet) -> Evaluation:
        ones = torch.ones(len(images.labels))
        predicted = torch.zeros(len(images.labels), dtype=torch.int64)
        return Evaluation(labels=images.labels, predicted=predicted, confidence=ones, label_probability=ones, loss=0)

    ledger = Ledger(tmp_path / "ledger.jsonl")
    images, _, recorded = evaluate_and_record(ledger, mini, WEIGHTS, all_zeros, is_main=True)
    assert isinstance(images, ImageSet)
    assert len(images.labels) == 1000
    assert recorded is not None
    assert recorded.entry.num_errors == int((images.labels != 0).sum())
    (written,) = ledger.entries(mini.sha256)
    assert asdict(written).items() >= {**asdict(WEIGHTS), "dataset": "mnist-mini", "num_images": 1000}.items()
    assert written.time is not None
    assert written.time.endswith("+00:00")
    fewer = ImageSet(images.images[:-1], images.labels[:-1])
    assert written.test_sha256 == images_sha256(images) != images_sha256(fewer)
    turned = ImageSet(images.images.flip(0), images.labels.flip(0))
    assert written.test_sha256 == images_sha256(turned)  # the order of the files does not matter
    _, _, recorded = evaluate_and_record(ledger, mini, WEIGHTS, all_zeros, is_main=False)
    assert recorded is None
