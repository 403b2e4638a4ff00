"""Fields of recipes by their names: values from texts, errors that name the field, and the list of all."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.recipes import RECIPES, Recipe
from trainer.recipes.fields import (
    describe_recipe,
    list_fields,
    parse_assignments,
    recipe_from_table,
    recipe_to_table,
    set_fields,
)

FAST = RECIPES["mnist-fast"]


def changes(*assignments: str) -> dict[str, Any]:
    new = list_fields(set_fields(FAST, parse_assignments(assignments)))
    return {field.name: field.value for field, old in zip(new, list_fields(FAST), strict=True) if field != old}


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("augment.shift=3", "augment.shift", 3),
        ("augment.rotate_degrees=5", "augment.rotate_degrees", 5.0),
        ("param_groups.filters.lr=.1", "param_groups.filters.lr", 0.1),
        ("param_groups.filters.lr = 1e-3", "param_groups.filters.lr", 0.001),
        ("balanced_sampling=True", "balanced_sampling", True),
        ("augment.fill=zero", "augment.fill", "zero"),
        ('augment.fill="zero"', "augment.fill", "zero"),
        ("widths=8,16", "widths", (8, 16)),
        ("widths=[8, 16]", "widths", (8, 16)),
        ("widths=8", "widths", (8,)),
        ("weights=5", "weights", "5"),
        ("schedule.points=[[0, 1], [1, 0.5]]", "schedule.points", ((0, 1), (1, 0.5))),
    ],
)
def test_a_text_becomes_a_value_of_the_fields_type(assignment: str, name: str, value: object) -> None:
    assert changes(assignment) == {name: value}
    assert type(changes(assignment)[name]) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("augment.shift=two", "--set augment.shift=two: must be a whole number"),
        ("augment.shift=2.5", "--set augment.shift=2.5: must be a whole number"),
        ("epochs=true", "--set epochs=true: must be a whole number"),
        ("balanced_sampling=1", "--set balanced_sampling=1: must be true or false"),
        ("precision=float16", "--set precision=float16: must be float32 or tf32 or bfloat16"),
        ("widths=a,b", "--set widths=a,b: must be a list of whole numbers"),
        ("augment.shft=2", "no field 'augment.shft': did you mean augment.shift"),
        ("lr=1", "no field 'lr': did you mean param_groups.filters.lr or param_groups.matrices.lr"),
        ("zzz=2", "no field 'zzz': `convoy recipes NAME` lists a recipe's fields"),
        (
            "augment=1",
            "--set augment: set one of its fields: augment.crop_area, augment.crop_ratio, augment.flip and 15 more; "
            "`convoy recipes NAME` shows a recipe's fields",
        ),
        ("param_groups.filters=1", "--set param_groups.filters: set one of its fields: param_groups.filters.lr"),
        ("param_groups.filter.lr=1", "no field 'param_groups.filter.lr': did you mean param_groups.filters.lr"),
        ("epochs.x=1", "--set epochs.x: epochs has no fields of its own"),
        ("name=x", "--set name: the recipe's own name cannot be set"),
        ("epochs=0", "epochs = 0: must be at least 1"),
        ("augment.shift=-1", "augment.shift = -1: must be at least 0"),
        ("param_groups.stem.momentum=2", "--set param_groups.stem.momentum=2: momentum 2.0: must be at least 0 and"),
        ("label_smoothing=nan", "label_smoothing = nan: must be at least 0"),
        ("augment.shift", "--set augment.shift: write FIELD=VALUE, such as augment.shift=2"),
        ("", "--set: write FIELD=VALUE"),
    ],
)
def test_a_wrong_assignment_is_one_line_about_the_field(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changes(assignment)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_value_that_is_the_fields_own_changes_no_digest() -> None:
    """`mnist-fast` turns images by up to 10 degrees, an int, which the fingerprint knows from 10.0."""
    assert type(set_fields(FAST, {"augment.rotate_degrees": "10.0"}).augment.rotate_degrees) is int


def test_another_batch_scales_the_rates_that_are_not_set() -> None:
    changed = set_fields(FAST, {"param_groups.filters.lr": "0.5", "global_batch_size": "1000"})
    assert changed.param_groups["filters"].lr == 0.5
    assert changed.param_groups["matrices"].lr == 2 * FAST.param_groups["matrices"].lr
    assert changed.global_batch_size == 1000


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_is_read_back_from_its_table(recipe: Recipe) -> None:
    assert recipe_from_table(recipe_to_table(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "no field 'epoch': did you mean epochs"),
        ({"augment": {"shft": 3}}, "no field 'augment.shft': did you mean augment.shift"),
        ({"epochs": "3"}, 'epochs = "3": must be a whole number'),
        ({"param_groups": {"filter": {"lr": 1}}}, 'the name param_groups.filter = "filter": must be stem or filters'),
        ({"param_groups": {"stem": {}}}, "param_groups.stem.lr is missing: must be a number"),
    ],
)
def test_a_faulty_table_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from_table({**recipe_to_table(FAST), **change})
    assert str(caught.value).startswith(message)


def test_every_field_is_listed_with_its_value_type_and_help() -> None:
    lines = list(describe_recipe(FAST))
    position = lines.index("augment.shift = 2")
    assert lines[position + 1] == "    Largest translation in pixels, both ways. [a whole number]"
    assert "param_groups.filters.lr = 0.12" in lines
    assert "schedule.points = [[0.0, 1.0], [1.0, 0.0]]" in lines
    without_help = {field.name for field in list_fields(replace(FAST)) if not field.help}
    assert without_help == set(), "every field of a recipe has a docstring"
