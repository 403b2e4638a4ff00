"""`result.json`: the same bytes for the same result, and read back, old files included."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.records.results import RESULT, make_result
from trainer.errors import CheckpointError
from trainer.records.result import Result

KEYS = (
    "recipe dataset dataset_sha256 dataset_notes test_sha256 model num_parameters world_size virtual_shards device "
    "precision seed epochs steps global_batch_size train_seconds images_per_second val_accuracy test_accuracy "
    "test_errors num_test test_interval balanced_accuracy recall_by_class warnings test_look num_test_looks "
    "test_accuracy_of_seeds looks_by_dataset "
    "weights_sha256 exported machine"
)
ADDED_LATER = (
    "num_test_looks",
    "test_accuracy_of_seeds",
    "looks_by_dataset",
    "virtual_shards",
    "dataset_notes",
    "balanced_accuracy",
    "recall_by_class",
    "warnings",
)


def test_the_file_has_the_fields_in_their_order(tmp_path: Path) -> None:
    RESULT.write(tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert list(written) == KEYS.split()
    assert written["exported"] is None
    assert written["test_accuracy_of_seeds"] == {"0": [0.91]}
    assert Result.read(tmp_path / "result.json") == RESULT


def test_a_member_of_a_study_has_no_accuracies_of_other_seeds() -> None:
    member = make_result(test_accuracy_of_seeds=None, stacked=4)
    assert list(member.to_json()) == [*KEYS.replace("test_accuracy_of_seeds ", "").split(), "stacked"]
    assert Result.from_json(member.to_json()) == member


def test_the_figures_with_views_are_there_where_the_recipe_has_views() -> None:
    views = {"val_accuracy_with_views": 0.91, "test_accuracy_with_views": 0.92, "test_errors_with_views": 80}
    result = make_result(**views, warnings=("it predicts one class",), num_averaged_seeds=2)
    written = result.to_json()
    assert set(written) == {*KEYS.split(), *views, "num_averaged_seeds"}
    assert Result.from_json(json.loads(json.dumps(written))) == result


def test_files_of_older_and_of_later_versions_are_read() -> None:
    values = {name: value for name, value in RESULT.to_json().items() if name not in ADDED_LATER} | {"of_later": 1}
    old = Result.from_json(values)
    assert (old.test_accuracy, old.num_test_looks, old.dataset_notes) == (0.91, None, ())
    assert (old.balanced_accuracy, old.recall_by_class, old.warnings) == (None, None, ())
    assert old.test_errors_with_views is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"test_accuracy": "0.9"}, r'test_accuracy = "0\.9": must be a number'),
        ({"num_test": 1e400}, "num_test = .*: must be a whole number"),
        ({"weights_sha256": []}, "weights_sha256 = .*: must be a text"),
        ({"test_accuracy_of_seeds": {"0": [None]}}, "test_accuracy_of_seeds = .*: must be a table or none"),
        ({"test_accuracy_of_seeds": {"a": [0.5]}}, "invalid literal"),
    ],
)
def test_a_value_of_another_type_is_damage(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT.to_json() | change))
    with pytest.raises(CheckpointError, match=rf"result\.json is damaged: {reason}"):
        Result.read(tmp_path / "result.json")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": "mnist"}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        Result.read(tmp_path / "result.json")
    assert Result.read(tmp_path / "nothing.json") is None
