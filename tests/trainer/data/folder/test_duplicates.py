"""Warnings about images that are in a data set twice."""

import shutil
from pathlib import Path

import pytest

from tests.trainer.data.folder.image_files import Load, put_class


def test_images_in_two_splits_are_logged_at_each_use(tmp_path: Path, load: Load, logged: list[str]) -> None:
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        for name in "ab":
            put_class(tmp_path / "x" / part / name, count)
    for index in range(2, 4):
        shutil.copy(tmp_path / "x" / "train" / "a" / f"00{index}.png", tmp_path / "x" / "test" / "a" / f"{index}.png")
    for index in range(2):
        shutil.copy(tmp_path / "x" / "train" / "a" / f"00{index}.png", tmp_path / "x" / "val" / "a" / f"{index}.png")
    shutil.copy(tmp_path / "x" / "val" / "b" / "001.png", tmp_path / "x" / "test" / "b" / "chosen-by.png")
    for _ in range(2):  # also when it is not decoded again
        logged.clear()
        load(tmp_path / "x")
        assert logged == [
            f"warning: folder:{tmp_path / 'x'}: {found}, too, pixel for pixel: {harm}; remove them from one of the two"
            for found, harm in (
                ("2 of 8 validation images are training images", "validation accuracy will be too high"),
                ("2 of 7 test images are training images", "test accuracy will be too high"),
                (
                    "1 of 7 test images are validation images",
                    "a model chosen by validation accuracy is chosen by them, too",
                ),
            )
        ]


@pytest.mark.parametrize("parts", [("train", "train"), ("train", "test"), ("val", "test")])
def test_a_picture_in_two_classes_is_a_contradiction_not_a_copy(
    tmp_path: Path, load: Load, logged: list[str], parts: tuple[str, str]
) -> None:
    for part in ("train", "val", "test"):
        for name in "ab":
            put_class(tmp_path / "x" / part / name, 4)
    one, other = tmp_path / "x" / parts[0] / "a" / "001.png", tmp_path / "x" / parts[1] / "b" / "other.png"
    shutil.copy(one, other)
    load(tmp_path / "x")
    assert logged == [
        f"warning: folder:{tmp_path / 'x'}: 1 image is in two classes, pixel for pixel: "
        f"{one} = {other}; no model can be right about both: remove the wrong one"
    ]


def test_many_contradictions_are_counted_and_some_are_named(root: Path, load: Load, logged: list[str]) -> None:
    for path in sorted((root / "cat").iterdir())[:5]:
        shutil.copy(path, root / "dog" / f"also-{path.name}")
    load(root)
    assert len(logged) == 2
    assert "5 images are in two classes, pixel for pixel: " in logged[1]
    assert f"{root}/cat/" in logged[1]
    assert logged[1].count("also-") == 3
    assert " and 2 more; no model" in logged[1]


def test_duplicates_among_training_images_are_logged(root: Path, load: Load, logged: list[str]) -> None:
    for path in list((root / "cat").iterdir()):
        shutil.copy(path, path.with_name(f"copy-of-{path.name}"))
    number = int((load(root).train.labels == 0).sum()) // 2
    assert logged[1:] == [
        f"warning: folder:{root}: {number} training images are duplicates of others, pixel for pixel: validation may "
        "get what is also trained on"
    ]
