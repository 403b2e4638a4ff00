"""Tests of the search space of a sweep: its candidates, and the recipes that they give."""

import json
from pathlib import Path

import pytest

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.recipes import RECIPES
from trainer.studies.search_space import Candidate, apply_candidate, as_options, make_candidates

MNIST = RECIPES["mnist"]


def test_a_grid_gives_all_combinations_in_order() -> None:
    found = make_candidates(("lr_scale=0.5,1", "augment.shift=0,2", "augment.fill=zero"), 0)
    assert found == [
        {"lr_scale": 0.5, "augment.shift": 0, "augment.fill": "zero"},
        {"lr_scale": 0.5, "augment.shift": 2, "augment.fill": "zero"},
        {"lr_scale": 1, "augment.shift": 0, "augment.fill": "zero"},
        {"lr_scale": 1, "augment.shift": 2, "augment.fill": "zero"},
    ]


def test_a_list_in_brackets_is_one_value() -> None:
    found = make_candidates(("widths=[8,16,16],[16, 32, 32],[]",), 0)
    recipe = RECIPES["cifar10-fast"]
    assert [apply_candidate(recipe, candidate).widths for candidate in found] == [(8, 16, 16), (16, 32, 32), ()]
    assert as_options(found[0]) == ["--set", "widths=[8,16,16]"]


def test_random_candidates_are_the_same_each_time() -> None:
    grid = ("lr_scale=1,2,3,4,5", "global_batch_size=10,20,30,40")
    found = make_candidates(grid, 6)
    assert found == make_candidates(grid, 6)
    assert len({json.dumps(candidate) for candidate in found}) == 6
    assert all(candidate in make_candidates(grid, 0) for candidate in found)


def test_a_candidate_changes_the_recipe() -> None:
    values: Candidate = {"lr_scale": 0.5, "augment.shift": 2, "label_smoothing": 0, "precision": "bfloat16"}
    changed = apply_candidate(MNIST, values)
    assert {group.lr for group in changed.param_groups.values()} == {0.05}
    assert changed.augment.shift == 2
    assert changed.label_smoothing == 0.0
    assert changed.precision == "bfloat16"
    assert MNIST.augment.shift == 0


def test_another_batch_scales_the_learning_rates_as_in_a_training() -> None:
    changed = apply_candidate(MNIST, {"global_batch_size": 50, "lr_scale": 3})
    assert changed == TrainConfig(global_batch_size=50, lr_scale=3).resolve()


def test_files_that_a_candidate_names_are_known_by_their_content(tmp_path: Path) -> None:
    file = tmp_path / "my_net.py"
    file.write_text("from torch import nn\nNet = nn.Identity\n")
    changed = apply_candidate(MNIST, {"network": f"{file}:Net"})
    assert changed == TrainConfig(network=f"{file}:Net").resolve()
    assert changed.file_sha256.keys() == {"network"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", 1),
        ("augment.shfit", 1),
        ("epochs.x", 1),
        ("dataset", "cifar10"),
        ("epochs", 0.5),
        ("lr_scale", -1),
        ("num_validation", 100),
        ("square", "pad"),
        ("global_batch_size", 0),
        ("epochs", 0),
        ("augment.shift", -1),
        ("label_smoothing", 1.5),
        ("label_smoothing", float("nan")),
        ("precision", "float8"),
        ("augment.flip", "up"),
    ],
)
def test_fields_that_cannot_be_swept_are_refused(name: str, value: float | str) -> None:
    with pytest.raises(ConfigError):
        apply_candidate(MNIST, {name: value})


@pytest.mark.parametrize("entry", ["lr_scale", "=1", "lr_scale=", "lr_scale=1,,2"])
def test_a_malformed_grid_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="write FIELD=VALUE"):
        make_candidates((entry,), 0)


@pytest.mark.parametrize("entry", ["widths=[8,16", "widths=8,16]", "widths=[8,16],[16"])
def test_a_missing_bracket_is_named(entry: str) -> None:
    with pytest.raises(ConfigError, match="a bracket is missing"):
        make_candidates((entry,), 0)


def test_two_entries_of_one_field_are_refused() -> None:
    with pytest.raises(ConfigError, match="--grid lr_scale=2: lr_scale is there twice; write all its values in one"):
        make_candidates(("lr_scale=1", "epochs=1,2", "lr_scale=2"), 0)
