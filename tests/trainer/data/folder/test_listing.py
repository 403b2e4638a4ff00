"""Layouts of folders, and everything that can be wrong with them."""

import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from tests.trainer.data.folder.image_files import Load, put, put_class
from trainer.data import load_dataset
from trainer.data.folder.listing import Files
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError, DataError


@pytest.mark.parametrize("validation_name", ["val", "valid", "validation"])
def test_split_folders(tmp_path: Path, load: Load, logged: list[str], validation_name: str) -> None:
    for part, count in (("train", 4), (validation_name, 3), ("test", 2)):
        for index, name in enumerate(("a", "b")):
            put_class(tmp_path / "x" / part / name, count, 10 * count + index)
    put_class(tmp_path / "x" / ".hidden", 1)
    dataset = load(tmp_path / "x")
    assert dataset.validation is not None
    assert dataset.train.images[:, 0, 0, 0].tolist() == [40] * 4 + [41] * 4
    assert dataset.validation.images[:, 0, 0, 0].tolist() == [30] * 3 + [31] * 3
    assert load_test_set(dataset).images[:, 0, 0, 0].tolist() == [20] * 2 + [21] * 2
    assert load_test_set(dataset).labels.tolist() == [0, 0, 1, 1]
    assert logged == []


@pytest.mark.parametrize("names", [("Train", "VAL", "Test"), ("TRAIN", "Validation", "test")])
def test_case_of_split_folders_does_not_matter(
    tmp_path: Path, load: Load, logged: list[str], names: tuple[str, ...]
) -> None:
    for part in names:
        for name in "ab":
            put_class(tmp_path / "x" / part / name, 3)
    put_class(tmp_path / "x" / "extra" / "c", 3)
    dataset = load(tmp_path / "x")
    assert dataset.classes == ("a", "b")
    assert (len(dataset.train), dataset.num_test, len(dataset.validation or [])) == (6, 6, 6)
    assert logged == [f"folder:{tmp_path / 'x'}: extra is not used: images are in {names[0]}"]


@pytest.mark.parametrize(
    "names", ["training testing", "val test", "train testing", "cat Training", "test_set training_set"]
)
def test_misnamed_split_folders_are_refused(tmp_path: Path, load: Load, names: str) -> None:
    for part in names.split():
        for name in "ab":
            put_class(tmp_path / "x" / part / name, 3)
    misnamed = [name for name in sorted(names.split()) if name not in ("train", "cat")]
    with pytest.raises(ConfigError, match=f"x has {' and '.join(misnamed)}, whose folders look like classes"):
        load(tmp_path / "x")


@pytest.mark.parametrize("names", ["train", "Test1 train", "test train", "test_images train_images"])
def test_parts_without_classes_are_no_classes(tmp_path: Path, load: Load, names: str) -> None:
    """As competitions and tables of labels have them: two of them would be learned as two classes."""
    for part in names.split():
        put_class(tmp_path / "x" / part, 3)
    with pytest.raises(DataError, match=rf"x/{names.split()[0]} has no class folders, .* into train/<class>/$"):
        load(tmp_path / "x")


def test_classes_may_have_names_of_splits(tmp_path: Path, load: Load, logged: list[str]) -> None:
    for name in ("dev", "test", "val/sub"):
        put_class(tmp_path / "x" / name, 5)
    put_class(tmp_path / "x" / "val", 5)
    assert load(tmp_path / "x").classes == ("dev", "test", "val")
    assert [line.partition(": ")[2] for line in logged[:2]] == [
        f"{name} is a class here; a part would be {name}/<class>/, beside train/<class>/" for name in ("test", "val")
    ]


@pytest.mark.parametrize("names", [("train", "train station"), ("test tube", "train", "trainers")])
def test_a_class_may_be_named_train(tmp_path: Path, load: Load, names: tuple[str, ...]) -> None:
    for name in names:
        put_class(tmp_path / "x" / name, 5)
    assert load(tmp_path / "x").classes == names


def test_links_are_followed_once(root: Path, load: Load) -> None:
    put_class(root.parent / "elsewhere", 10, 120)
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root.parent / "elsewhere" / "back").symlink_to(root.parent / "elsewhere")
    (root / "cat" / "up").symlink_to(root)  # dogs are no cats
    dataset = load(root)
    assert dataset.classes == ("cat", "dog", "linked")
    assert len(dataset.train) + dataset.num_test == 30


def test_other_files_are_skipped_and_counted(root: Path, load: Load, logged: list[str]) -> None:
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (root / "cat" / name).write_text("x")
    for folder in (".cache", "cat/sub/.copies", ".hidden/sub"):
        put(root / folder / "copy.png")
    (root / "dog" / "LICENSE").write_text("x")
    (root / "dog" / "more.TXT").write_text("x")
    os.mkfifo(root / "dog" / "pipe.png")
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + dataset.num_test == 20
    assert logged[0] == f"folder:{root}: 5 files skipped (.txt, .db, no extension, not a regular file)"


@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir", "#recycle", "@Recycle", ".@__thumb"),
        *("$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information"),
        *("__MACOSX", ".AppleDouble", ".Trashes", "lost+found", ".Trash-1000"),
        *("_gsdata_", ".ipynb_checkpoints", "~snapshot"),
    ],
)
def test_folders_of_systems_are_passed_over_and_counted(root: Path, load: Load, logged: list[str], name: str) -> None:
    (root / name).mkdir()
    for place in ("cat", "dog/sub", f"dog/{name}", f"cat/sub/{name}"):
        put(root / place / "000.png", 77)
        put(root / place / name / "000.png" / "thumbnail.png", 99)
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + dataset.num_test == 21
    assert logged[0] == f"folder:{root}: 5 folders of systems passed over ({name})"


def test_folders_of_systems_are_no_splits_and_no_classes(tmp_path: Path, load: Load, logged: list[str]) -> None:
    for part in ("train", "test"):
        for name in ("a", "b", "@eaDir", "lost+found"):
            put_class(tmp_path / "x" / part / name, 2)
    put_class(tmp_path / "x" / "__MACOSX" / "train" / "c", 2)
    dataset = load(tmp_path / "x")
    assert dataset.classes == ("a", "b")
    assert logged == [f"folder:{tmp_path / 'x'}: 5 folders of systems passed over (@eaDir, lost+found, __MACOSX)"]


# An accent, an accent twice, syllables of three letters each, and a unit that has a character of its own.
NAMES = ("caf\u00e9", "b\u1ed9t", "\ud55c\uae00", "\u212bngstr\u00f6m")


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize("name", NAMES)
def test_class_names_of_two_unicode_forms_are_one_class(tmp_path: Path, load: Load, name: str) -> None:
    for part, names in (("train", [name]), ("test", [nfd(name)]), ("val", [nfd(name), nfc(name)])):
        for each in (*names, "a"):
            put_class(tmp_path / "x" / part / each, 2)
    dataset = load(tmp_path / "x")
    assert dataset.classes == ("a", nfc(name))
    assert load_test_set(dataset).labels.tolist() == [0, 0, 1, 1]
    assert dataset.validation is not None
    assert dataset.validation.labels.tolist() == [0] * 2 + [1] * 4


@pytest.mark.parametrize("name", NAMES)
def test_two_folders_of_one_class_side_by_side(tmp_path: Path, load: Load, name: str) -> None:
    for each in (nfc(name), nfd(name), "a"):
        put_class(tmp_path / "x" / each, 5)
    assert load(tmp_path / "x").classes == ("a", nfc(name))
    shutil.rmtree(tmp_path / "x" / "a")
    with pytest.raises(DataError, match="one class only"):
        load(tmp_path / "x")


@pytest.mark.parametrize("name", ["cat/gone.png", "elk", "test"])
def test_a_broken_link_is_named(root: Path, load: Load, name: str) -> None:
    """A link to a disk that is not mounted may have been a class, or the test set."""
    (root / name).symlink_to(root / "nothing")
    with pytest.raises(DataError, match=rf"{name} is a link to nothing: remove it, or restore"):
        load(root)


def test_folders_that_convoy_makes_are_no_classes(root: Path, load: Load, logged: list[str]) -> None:
    """A training in the folder itself: `cd photos; convoy train .`."""
    for name in ("runs/mnist-1/figures/curves.png", "models/pets/1/picture.png", "runs-of-ours/one.png"):
        put(root / name)
    (root / "runs" / "mnist-1" / "config.json").write_text("{}")
    assert load(root).classes == ("cat", "dog", "models", "runs-of-ours")
    (root / "models" / "pets" / "config.pbtxt").write_text("")
    logged.clear()
    assert load(root).classes == ("cat", "dog", "runs-of-ours")
    assert f"folder:{root}: 2 folders of systems passed over (models, runs)" in logged


def test_class_names_that_differ_in_case_get_a_warning(root: Path, load: Load, logged: list[str]) -> None:
    put_class(root / "Dog", 3)
    assert load(root).classes == ("Dog", "cat", "dog")
    warning = f"warning: folder:{root}: Dog and dog are separate classes, whose names differ in case alone"
    assert logged[0] == warning


def test_images_in_no_class_are_counted(tmp_path: Path, load: Load, logged: list[str]) -> None:
    root = tmp_path / "x"
    for name in ("train/a", "train/b.png", "test/a"):
        put_class(root / name, 2)
    for name in ("cover.jpg", "train/one.png", "train/two.PNG", "train/.hidden.png", "train/notes.txt", "test/one.gif"):
        put(root / name) if name.endswith("g") else (root / name).write_text("x")
    load(root)
    assert logged[:2] == [
        f"folder:{root}: 2 images are in {root / 'train'} itself, in no class, and not used",
        f"folder:{root}: 1 image is in {root / 'test'} itself, in no class, and not used",
    ]


def test_an_empty_class_is_named(root: Path, load: Load) -> None:
    (root / "elk").mkdir()
    with pytest.raises(DataError, match=r"images/elk is an empty class: no image in it; images are \.jpg, "):
        load(root)
    (root / "elk" / "one.svg").write_text("<svg/>")
    with pytest.raises(DataError, match=r"no image in it, only 1 file \(\.svg\); images are \.jpg, "):
        load(root)


def test_a_class_without_training_images_is_named(tmp_path: Path, load: Load) -> None:
    for part, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            put_class(tmp_path / "x" / part / name, 2)
    with pytest.raises(DataError, match=r"test/c is a class that the training images do not have; theirs are a, b$"):
        load(tmp_path / "x")


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("count", [0, 3])
def test_a_split_without_class_folders_is_refused(tmp_path: Path, load: Load, part: str, count: int) -> None:
    for name in ("train/a", "train/b"):
        put_class(tmp_path / "x" / name, 2)
    (tmp_path / "x" / part).mkdir()
    put_class(tmp_path / "x" / part, count)
    with pytest.raises(DataError, match=rf"x/{part} has no class folders, .*: put them in {part}/<class>/"):
        load(tmp_path / "x")


def test_times_beyond_64_bits_are_told_apart_from_others() -> None:
    files = Files()
    for year in (1601, 1970, 2500):
        times = {"st_mtime_ns": (year - 1970) * 365 * 24 * 3600 * 10**9}
        files.add(b"x", 0, os.stat_result((0,) * 10, times))
    assert files.changed_ns.tolist() == [-(2**63), 0, 2**63 - 1]


def test_one_class_is_too_few(tmp_path: Path, load: Load) -> None:
    put_class(tmp_path / "x" / "a" / "b", 5)
    put_class(tmp_path / "x" / "a" / "c", 5)
    hint = f"; if its folders are the classes, give {tmp_path / 'x' / 'a'}$"
    with pytest.raises(DataError, match=rf"x has one class only \(a\): at least two are needed{hint}"):
        load(tmp_path / "x")
    put_class(tmp_path / "x" / "a", 1)
    with pytest.raises(DataError, match=r"x has one class only \(a\): at least two are needed$"):
        load(tmp_path / "x")


def test_wrong_paths(tmp_path: Path, root: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match="folder: needs a path"):
        load_dataset("folder:", tmp_path, log=print)
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        load(root / "cat" / "000.png")
    with pytest.raises(ConfigError, match="images/cat holds images itself: give the folder that"):
        load(root / "cat")
    put_class(root / "cat" / "more", 1)
    with pytest.raises(ConfigError, match="images/cat holds images itself"):
        load(root / "cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no class folders"):
        load(tmp_path / "empty")
    put_class(tmp_path / "x" / "train" / "a", 1)
    put_class(tmp_path / "x" / "val" / "a", 1)
    put_class(tmp_path / "x" / "valid" / "a", 1)
    with pytest.raises(ConfigError, match="both val and valid"):
        load(tmp_path / "x")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone who may not read")
def test_a_folder_that_may_not_be_read(root: Path, load: Load) -> None:
    root.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="cannot be read"):
            load(root)
    finally:
        os.seteuid(0)
