"""The index of a folder: each file is read once, and files that cannot be read are left out or named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data.folder.image_files import Load, put
from trainer.data.folder import decode
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError, DataError


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded for the index, in any order."""
    names: list[str] = []
    use_image = decode.use_image

    def remember(path: Path, use: Callable[..., Any]) -> Any:
        names.append(path.name)
        return use_image(path, use)

    monkeypatch.setattr(decode, "use_image", remember)
    return names


def spoil(path: Path) -> Path:
    path.write_bytes(b"no image")
    return path


def test_only_new_and_changed_files_are_read_again(root: Path, load: Load, decoded: list[str]) -> None:
    first = load(root, source="streamed")
    assert len(decoded) == 20
    decoded.clear()
    load(root, source="streamed")
    load(root, 4, source="streamed")
    assert decoded == []
    put(root / "dog" / "new.png", 7)
    put(root / "cat" / "001.png", 8)
    (root / "cat" / "002.png").unlink()
    again = load(root, source="streamed")
    assert sorted(decoded) == ["001.png", "new.png"]
    assert len(again.train) + again.num_test == 20
    assert first.path != again.path
    del first
    put(root / "dog" / "newer.png", 9)
    newest = load(root, source="streamed")
    assert sorted(path.name for path in newest.path.parent.glob("*.index")) == sorted(
        {again.path.name, newest.path.name}
    )  # one is still in use


@pytest.mark.parametrize("source", ["resident", "streamed"])
def test_what_changed_in_the_folder_is_named(root: Path, load: Load, logged: list[str], source: str) -> None:
    load(root, source=source)
    assert not any("has changed" in line for line in logged)
    put(root / "dog" / "new.png", 7)
    put(root / "cat" / "001.png", 8)
    for number in range(2, 6):
        (root / "cat" / f"{number:03}.png").unlink()
    load(root, source=source)
    assert [line for line in logged if "has changed" in line] == [
        f"folder:{root}: the folder has changed since it was last read: "
        "4 gone (cat/002.png, cat/003.png, cat/004.png and 1 more), 1 new (dog/new.png), 1 changed (cat/001.png)"
    ]
    logged.clear()
    load(root, source=source)
    assert not any("has changed" in line for line in logged)


def test_an_interrupted_index_goes_on(
    root: Path, load: Load, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_SAVE_EVERY_S", -1.0)
    use_image = decode.use_image

    def stop(path: Path, use: Callable[..., Any]) -> Any:
        if (path.parent.name, path.name) == ("dog", "003.png"):  # of all threads, results come in the files' order
            raise KeyboardInterrupt
        return use_image(path, use)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(decode, "use_image", stop)
        with pytest.raises(KeyboardInterrupt):
            load(root, source="streamed")
    decoded.clear()
    assert len(load(root, source="streamed").train) >= 16
    assert sorted(decoded) == [f"{number:03}.png" for number in range(3, 10)]


@pytest.mark.parametrize("source", ["resident", "streamed"])
def test_bad_files_are_left_out_and_told(root: Path, load: Load, logged: list[str], source: str) -> None:
    whole = load(root, source=source)
    bad = [spoil(root / "cat" / "003.png"), spoil(root / "dog" / "004.png")]
    with pytest.raises(ConfigError, match="--skip-bad-images -1: must be at least 0"):
        load(root, source=source, skip_bad_images=-1)
    for number in (0, 1):
        with pytest.raises(DataError, match=r"2 of 20 images cannot be read: .*003.png.*; --skip-bad-images 2 leaves"):
            load(root, source=source, skip_bad_images=number)
    logged.clear()
    for _ in range(2):
        without = load(root, source=source, skip_bad_images=2)
        assert len(without.train) + len(load_test_set(without)) == 18
        assert without.sha256 != whole.sha256
        note = without.notes[0]
        assert note.startswith(f"folder:{root}: 2 of 20 images cannot be read and are left out: {bad[0]} (")
        assert note in logged
    with pytest.raises(DataError, match=r"2 (of 20 )?images cannot be read"):
        load(root, source=source, skip_bad_images=1)
    for path in bad:
        path.unlink()
    assert load(root, source=source).sha256 == without.sha256  # the data set is what it consists of


@pytest.mark.parametrize("source", ["resident", "streamed"])
def test_a_disk_that_failed_may_be_back(root: Path, load: Load, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(DataError, match=r"20 of 20 images cannot be read: .*Input/output error"):
            load(root, source=source)
    assert len(load(root, source=source).train) >= 16


def test_files_that_are_left_out_stay_out(root: Path, load: Load, decoded: list[str]) -> None:
    spoil(root / "cat" / "003.png")
    first = load(root, source="streamed", skip_bad_images=5)
    decoded.clear()
    assert load(root, source="streamed", skip_bad_images=5).sha256 == first.sha256
    assert decoded == []


def test_a_class_needs_a_readable_image(root: Path, load: Load) -> None:
    put(root / "elk" / "0.png")
    spoil(root / "elk" / "0.png")
    with pytest.raises(DataError, match="no training image of class elk can be read"):
        load(root, source="streamed", skip_bad_images=1)


def _cut(content: bytes) -> bytes:
    return content[:300]


def _flip_a_label(content: bytes) -> bytes:
    labels = np.repeat([0, 1], 10).astype("<i8").tobytes()
    assert content.count(labels) == 1
    return content.replace(labels, labels[:-8] + bytes(8))


@pytest.mark.parametrize(
    ("damage", "problem"), [(_cut, "not a file of tensors"), (_flip_a_label, "its content does not match its digest")]
)
def test_a_damaged_index_is_made_again(
    damage: Callable[[bytes], bytes], problem: str, root: Path, load: Load, logged: list[str]
) -> None:
    first = load(root, source="streamed")
    sha256, path = first.sha256, first.path
    del first
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        assert load(root, source="streamed").sha256 == sha256
    line = f"folder:{root}: {path} is damaged ({problem}): reading the files again"
    assert logged.count(line) == sum("damaged (" in line for line in logged) == 1
