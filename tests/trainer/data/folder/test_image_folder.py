"""Folders of images: test images are held out, and a decoded file is used for as long as it is valid."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.trainer.data.folder.image_files import Load, put, put_class
from trainer.data.folder import image_folder
from trainer.data.test_set import load_test_set
from trainer.errors import DataError


def test_a_flat_folder_holds_test_images_out(root: Path, load: Load, logged: list[str]) -> None:
    dataset = load(root)
    assert dataset.name == f"folder:{root}"
    assert dataset.classes == ("cat", "dog")
    test = load_test_set(dataset)
    for part in (dataset.train, test):
        assert part.images.shape[1:] == (3, 8, 8)
        assert part.images[part.labels == 0, :, 0].unique().tolist() == [50]
        assert part.images[part.labels == 1, :, 0].unique().tolist() == [200]
    assert (len(dataset.train) + len(test), dataset.validation) == (20, None)
    assert logged == [
        f"folder:{root}: no test folder: {len(test)} of 20 images are held out as test set, by their content"
    ]


@pytest.mark.parametrize("source", ["resident", "streamed"])
@pytest.mark.parametrize("skip_bad_images", [0, 1])
def test_a_folder_that_another_process_has_opened_is_not_listed_again(
    root: Path, load: Load, monkeypatch: pytest.MonkeyPatch, source: str, skip_bad_images: int
) -> None:
    options = {"source": source, "skip_bad_images": skip_bad_images}
    first = load(root, 8, **options)
    with monkeypatch.context() as patched:
        patched.setattr(image_folder, "list_folder", lambda root: pytest.fail(f"{root} is listed again"))
        second = load(root, 8, **options, known_path=first.path)
    assert (second.sha256, second.path) == (first.sha256, first.path)
    assert torch.equal(load_test_set(second).labels, load_test_set(first).labels)
    shutil.rmtree(first.path.parent)  # another host's, for all that this one knows
    assert load(root, 8, **options, known_path=first.path).sha256 == first.sha256


def test_an_image_stays_in_its_split(tmp_path: Path, load: Load) -> None:
    pixels = iter(np.random.RandomState(0).randint(0, 256, (80, 8, 8)).astype(np.uint8))

    def add(count: int) -> None:
        for name in ("cat", "dog"):
            folder = tmp_path / "x" / name
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                image = next(pixels)
                Image.fromarray(image).save(folder / f"{image[0, 0]}-{image[0, 1]}-{image[0, 2]}.bmp")

    def test_images() -> set[bytes]:
        dataset = load(tmp_path / "x")
        test, train = (
            {image.numpy().tobytes() for image in part.images} for part in (load_test_set(dataset), dataset.train)
        )
        assert not test & train
        return test

    add(20)
    before = test_images()
    add(20)
    after = test_images()
    assert before < after
    info = load(tmp_path / "x")
    for number, path in enumerate(sorted((tmp_path / "x").glob("*/*.bmp"))):
        path.rename(path.with_name(f"{number % 7}-{number}.bmp"))  # in another order
    assert load(tmp_path / "x").sha256 == info.sha256
    for path in sorted((tmp_path / "x").glob("*/*.bmp"))[::3]:
        shutil.copy(path, path.with_name(f"copy-of-{path.name}"))
    assert test_images() == after
    for path in sorted((tmp_path / "x").glob("*/*.bmp"))[1::4]:
        path.unlink()
    assert test_images() <= after


def save_in_many_ways(folder: Path, pixels: np.ndarray) -> None:
    """Saves a picture in files that differ in format, metadata, palette, transparency and orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    image, name = Image.fromarray(pixels), f"{pixels.tobytes()[:6].hex()}"
    note, turned = PngInfo(), Image.Exif()
    note.add_text("Comment", name)
    turned[0x0112] = 8
    image.save(folder / f"{name}.png")
    image.save(folder / f"{name}-note.png", pnginfo=note, dpi=(300, 300))
    image.save(folder / f"{name}.bmp")
    image.save(folder / f"{name}.tif", compression="tiff_lzw")
    image.convert("RGBA").save(folder / f"{name}.webp", lossless=True)
    image.transpose(Image.Transpose.ROTATE_270).save(folder / f"{name}-turned.png", exif=turned)


def test_equal_pictures_are_on_one_side_whatever_their_files(tmp_path: Path, load: Load, logged: list[str]) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (16, 12, 12, 3)).astype(np.uint8)
    for number, each in enumerate(pixels):
        save_in_many_ways(tmp_path / "x" / "ab"[number % 2], each)
    for size in (12, 4):
        logged.clear()
        dataset = load(tmp_path / "x", size)
        assert dataset.num_test % 6 == 0
        assert len(dataset.train) + dataset.num_test == 96
        assert not any("test images are training images" in line for line in logged)


def test_the_side_of_a_picture_does_not_depend_on_the_image_size(tmp_path: Path, load: Load) -> None:
    """The name of each file is its grey level, which no size changes."""
    for level in range(0, 240, 4):
        put(tmp_path / "x" / "ab"[level % 8 // 4] / f"{level}.png", (level,) * 3, (20 + level, 30))
    sides = [sorted(load_test_set(load(tmp_path / "x", size)).images[:, 0, 0, 0].tolist()) for size in (4, 16)]
    assert sides[0] == sides[1]
    assert 2 <= len(sides[0]) < 20


def test_the_name_of_a_folder_may_be_long_and_not_utf8(
    tmp_path: Path, load: Load, root: Path, logged: list[str]
) -> None:
    expected = load(root).sha256
    for name in (b"caf\xe9", b"x" * 255, "\u00e9".encode() * 127, b"\xff" * 255, b"a.b c"):
        moved = tmp_path / os.fsdecode(name)
        root.rename(moved)
        logged.clear()
        datasets = [load(moved) for _ in range(2)]
        assert {dataset.sha256 for dataset in datasets} == {expected}
        assert {dataset.name for dataset in datasets} == {f"folder:{moved}"}
        assert len(logged) == 2, logged  # about the test images; nothing is damaged
        root = moved


def test_names_of_classes_and_files_may_be_long_and_not_utf8(tmp_path: Path, load: Load) -> None:
    for name in (b"caf\xe9", b"y" * 255):
        put_class(tmp_path / "x" / os.fsdecode(name), 5)
    put(tmp_path / "x" / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff" * 251 + b".png"))
    assert load(tmp_path / "x").classes == (os.fsdecode(b"caf\xe9"), "y" * 255)
    assert load(tmp_path / "x").classes == (os.fsdecode(b"caf\xe9"), "y" * 255)


def test_too_few_images_to_hold_any_out(tmp_path: Path, load: Load) -> None:
    for name in "ab":
        put(tmp_path / "x" / name / "0.png")
        shutil.copy(tmp_path / "x" / name / "0.png", tmp_path / "x" / name / "1.png")
    with pytest.raises(DataError, match="no class of two different images"):
        load(tmp_path / "x")


def test_only_a_changed_folder_is_decoded_again(root: Path, load: Load, logged: list[str]) -> None:
    first, second = load(root).path, load(root).path
    assert first == second
    assert len(logged) == 2
    put(root / "cat" / "new.png", (51, 51, 51))
    third = load(root)
    assert third.path != first
    assert len(third.train) + third.num_test == 21
    names = {path.name for path in third.path.parent.iterdir()}
    assert names == {third.path.name, f"{third.path.stem.removeprefix('native-')}.index"}
    other_size = load(root, 4)
    assert third.path.exists()
    assert other_size.train.images.shape[2:] == (4, 4)


def test_a_decoded_file_in_use_is_not_deleted(root: Path, load: Load) -> None:
    """A training opens its test images at its end, even if another process has decoded the changed folder since."""
    training = load(root)
    put(root / "cat" / "new.png", (51, 51, 51))
    load(root)
    assert len(load_test_set(training)) == training.num_test
    path = training.path
    del training
    put(root / "cat" / "newer.png", (52, 51, 51))
    load(root)
    assert path is not None
    assert not path.exists()


def test_a_deleted_decoded_file_is_one_line(root: Path, load: Load) -> None:
    dataset = load(root)
    assert dataset.path is not None
    dataset.path.unlink()
    with pytest.raises(DataError, match="has been deleted while it was in use"):
        load_test_set(dataset)


def test_a_new_modification_time_is_noticed(root: Path, load: Load) -> None:
    first = load(root)
    os.utime(root / "cat" / "000.png", ns=(1, 1))
    assert load(root).path != first.path


def test_a_damaged_decoded_file_is_made_again(root: Path, load: Load, logged: list[str]) -> None:
    first = load(root)
    first.path.write_bytes(first.path.read_bytes()[:500])
    assert load(root).sha256 == first.sha256
    assert "set aside" in logged[1]
