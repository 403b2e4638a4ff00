"""The values that a recipe's augmentation may have."""

from dataclasses import fields

import pytest

from trainer.errors import ConfigError
from trainer.recipes import RECIPES
from trainer.recipes.augmentation import Augment, check_shift
from trainer.recipes.fields import list_fields


@pytest.mark.parametrize(
    "values",
    [
        {"shift": -1},
        {"crop_area": 0},
        {"crop_area": 1.5},
        {"crop_ratio": 0.5},
        {"rotate_degrees": 181},
        {"scale": 0.95},
        {"brightness": 1.1},
        {"hue": 0.6},
        {"erase": -0.1},
        {"erase_area": 0},
        {"mixup": float("nan")},
        {"cutmix": float("inf")},
        {"mix_share": 2},
    ],
)
def test_an_impossible_value_is_named(values: dict[str, float]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=f"augment.{name} .*: must be at least"):
        Augment(**values)  # type: ignore[arg-type]


def test_the_default_does_nothing() -> None:
    augment = Augment()
    assert not any((augment.is_affine, augment.crops, augment.jitters, augment.mixes))
    assert Augment(mixup=0.2).mixes
    assert not Augment(mixup=0.2, mix_share=0).mixes


def test_every_field_can_be_set_and_has_help() -> None:
    found = {field.name: field.help for field in list_fields(RECIPES["mnist"]) if field.name.startswith("augment.")}
    assert found.keys() == {f"augment.{field.name}" for field in fields(Augment)}
    assert all(found.values())


def test_images_are_not_shifted_out_of_themselves() -> None:
    check_shift(Augment(shift=7), 8)
    with pytest.raises(ConfigError, match="images of 8 pixels cannot be shifted by 8"):
        check_shift(Augment(shift=8), 8)
