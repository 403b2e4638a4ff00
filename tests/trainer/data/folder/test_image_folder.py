"""Folders of images: layouts, changes, and all that can be wrong with them."""

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.data import Dataset, load_dataset
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError, DataError

NEEDS_AVIF = pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="this Pillow reads no AVIF")


def put(path: Path, colour: int | tuple[int, ...] = 100, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """A PNG; no two of different paths have the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = PngInfo()
    note.add_text("Comment", f"{path.parent.name}/{path.name}")
    Image.new(mode, size, colour).save(path, pnginfo=note)
    return path


def put_class(folder: Path, count: int, colour: int = 100, mode: str = "RGB") -> None:
    """PNGs of 8 x 8 pixels of one colour, but for the last pixel, which no two of different folders have the same."""
    for index in range(count):
        path = put(folder / f"{index:03d}.png", colour if mode == "L" else (colour,) * 3, mode=mode)
        with Image.open(path) as image:
            own = zlib.crc32("/".join(path.parts[-3:]).encode())
            image.putpixel((7, 7), own % 256 if mode == "L" else tuple(own.to_bytes(4, "little")[:3]))
            image.save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of ten images, a layout without a test folder."""
    put_class(tmp_path / "images" / "cat", 10, 50)
    put_class(tmp_path / "images" / "dog", 10, 200)
    return tmp_path / "images"


@pytest.fixture
def load(tmp_path: Path, logged: list[str]) -> Callable[..., Dataset]:
    def load_folder(path: Path, image_size: int | None = None) -> Dataset:
        return load_dataset(f"folder:{path}", tmp_path / "data", image_size=image_size, log=logged.append)

    return load_folder


Load = Callable[..., Dataset]


def test_flat(root: Path, load: Load, logged: list[str]) -> None:
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


def test_an_image_stays_in_its_part(tmp_path: Path, load: Load) -> None:
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
    for path in sorted((tmp_path / "x").glob("*/*.bmp"))[::4]:
        path.unlink()
    assert test_images() <= after


@pytest.mark.parametrize("validation_name", ["val", "valid", "validation"])
def test_split(tmp_path: Path, load: Load, logged: list[str], validation_name: str) -> None:
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


def test_copies_among_the_parts_are_told(tmp_path: Path, load: Load, logged: list[str]) -> None:
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        for name in "ab":
            put_class(tmp_path / "x" / part / name, count)
    for index in range(2, 4):
        shutil.copy(tmp_path / "x" / "train" / "a" / f"00{index}.png", tmp_path / "x" / "test" / "b" / f"{index}.png")
    for index in range(2):
        shutil.copy(tmp_path / "x" / "train" / "a" / f"00{index}.png", tmp_path / "x" / "val" / "a" / f"{index}.png")
    shutil.copy(tmp_path / "x" / "val" / "b" / "001.png", tmp_path / "x" / "test" / "b" / "chosen-by.png")
    for _ in range(2):  # not only to who decodes it
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


def test_copies_in_training_are_told_where_some_will_validate(root: Path, load: Load, logged: list[str]) -> None:
    for path in list((root / "cat").iterdir()):
        shutil.copy(path, path.with_name(f"copy-of-{path.name}"))
    number = int((load(root).train.labels == 0).sum()) // 2
    assert logged[1:] == [
        f"warning: folder:{root}: {number} training images are duplicates of others, pixel for pixel: some may be set "
        "aside for validation while their duplicates are trained on"
    ]


@pytest.mark.parametrize("names", [("Train", "VAL", "Test"), ("TRAIN", "Validation", "test")])
def test_parts_in_any_spelling(tmp_path: Path, load: Load, logged: list[str], names: tuple[str, ...]) -> None:
    for part in names:
        for name in "ab":
            put_class(tmp_path / "x" / part / name, 3)
    put_class(tmp_path / "x" / "extra" / "c", 3)
    dataset = load(tmp_path / "x")
    assert dataset.classes == ("a", "b")
    assert (len(dataset.train), dataset.num_test, len(dataset.validation or [])) == (6, 6, 6)
    assert logged == [f"folder:{tmp_path / 'x'}: extra is not used: images are in {names[0]}"]


@pytest.mark.parametrize("names", ["training testing", "val test", "train testing", "cat Training"])
def test_parts_under_other_names_are_no_classes(tmp_path: Path, load: Load, names: str) -> None:
    for part in names.split():
        for name in "ab":
            put_class(tmp_path / "x" / part / name, 3)
    misnamed = [name for name in sorted(names.split()) if name not in ("train", "cat")]
    with pytest.raises(ConfigError, match=f"x has {' and '.join(misnamed)}, which look like splits of a data set"):
        load(tmp_path / "x")


def test_classes_named_as_parts_are_classes(tmp_path: Path, load: Load) -> None:
    for name in ("dev", "test", "val/sub"):
        put_class(tmp_path / "x" / name, 5)
    put_class(tmp_path / "x" / "val", 5)
    assert load(tmp_path / "x").classes == ("dev", "test", "val")


def test_a_class_named_train_is_a_class(tmp_path: Path, load: Load) -> None:
    for name in ("bus", "train"):
        put_class(tmp_path / "x" / name, 5)
    assert load(tmp_path / "x").classes == ("bus", "train")


def test_only_what_has_changed_is_decoded_anew(root: Path, load: Load, logged: list[str]) -> None:
    first, second = load(root).path, load(root).path
    assert first == second
    assert len(logged) == 2
    put(root / "cat" / "new.png", (51, 51, 51))
    third = load(root)
    assert third.path != first
    assert len(third.train) + third.num_test == 21
    assert [path.name for path in third.path.parent.iterdir()] == [third.path.name]
    other_size = load(root, 4)
    assert third.path.exists()
    assert other_size.train.images.shape[2:] == (4, 4)


def test_what_somebody_uses_is_not_deleted(root: Path, load: Load) -> None:
    """A training opens its test images at its end, whoever has decoded the changed folder meanwhile."""
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


def test_a_decoded_file_that_is_deleted_all_the_same_is_one_line(root: Path, load: Load) -> None:
    dataset = load(root)
    assert dataset.path is not None
    dataset.path.unlink()
    with pytest.raises(DataError, match="has been deleted while it was in use"):
        load_test_set(dataset)


def test_touched_content_of_the_same_size_is_noticed(root: Path, load: Load) -> None:
    first = load(root)
    os.utime(root / "cat" / "000.png", ns=(1, 1))
    assert load(root).path != first.path


def test_a_damaged_decoded_folder_is_made_again(root: Path, load: Load, logged: list[str]) -> None:
    first = load(root)
    first.path.write_bytes(first.path.read_bytes()[:500])
    assert load(root).sha256 == first.sha256
    assert "set aside" in logged[1]


@pytest.mark.parametrize(("modes", "channels"), [(("L", "L"), 1), (("L", "RGB"), 3), (("RGB", "RGB"), 3)])
def test_grey_only_if_all_are(tmp_path: Path, load: Load, modes: tuple[str, str], channels: int) -> None:
    for name, mode in zip("ab", modes, strict=True):
        put_class(tmp_path / "x" / name, 5, 77, mode)
    dataset = load(tmp_path / "x")
    assert dataset.train.images.shape[1] == channels
    assert dataset.train.images[..., 0, :].unique().tolist() == [77]


def read_one(load: Load, folder: Path, image: Image.Image, name: str = "x.png", **options: Any) -> torch.Tensor:
    """The pixels that `image` becomes among grey images: [C, 8, 8]."""
    for kind in ("a", "b"):
        put_class(folder / "train" / kind, 1, mode="L")
        put_class(folder / "test" / kind, 1, mode="L")
    path = folder / "train" / "a" / name
    image.save(path, **options)
    (folder / "train" / "a" / "000.png").unlink()
    return load(folder, 8).train.images[0]


def test_palette_of_colours(tmp_path: Path, load: Load) -> None:
    image = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    assert read_one(load, tmp_path / "x", image)[:, 0, 0].tolist() == [10, 200, 30]


def test_palette_of_greys_is_grey(tmp_path: Path, load: Load) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 90, 90, 90])
    assert read_one(load, tmp_path / "x", image)[:, 0, 0].tolist() == [90]


def test_transparency_is_laid_on_white(tmp_path: Path, load: Load) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_one(load, tmp_path / "x", image).unique().tolist() == [255]


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, load: Load) -> None:
    image = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    assert read_one(load, tmp_path / "x", image).unique().tolist() == [0x80]


def test_black_and_white(tmp_path: Path, load: Load) -> None:
    assert read_one(load, tmp_path / "x", Image.new("1", (8, 8), 1)).unique().tolist() == [255]


def test_cmyk(tmp_path: Path, load: Load) -> None:
    pixels = read_one(load, tmp_path / "x", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "x.jpg", quality=100)
    assert pixels[:, 4, 4].tolist() == pytest.approx([255, 0, 0], abs=4)


def test_orientation_is_applied(tmp_path: Path, load: Load) -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = read_one(load, tmp_path / "x", image, "x.png", exif=exif)
    assert pixels[0, :, 7].tolist() == [255] * 8  # white at the right
    assert pixels[0, :, 0].tolist() == [0] * 8


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path: Path, load: Load) -> None:
    image = Image.new("L", (64, 16), 0)
    image.paste(255, (24, 0, 40, 16))
    pixels = read_one(load, tmp_path / "x", image)
    assert int(pixels[0, :, 1:7].min()) == 255


def test_resizing_is_antialiased(tmp_path: Path, load: Load) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    pixels = read_one(load, tmp_path / "x", Image.fromarray(stripes))
    assert int(pixels.min()) > 110
    assert int(pixels.max()) < 145


def test_sizes_that_differ_need_an_image_size(root: Path, load: Load) -> None:
    put(root / "cat" / "wide.png", (1, 2, 3), (30, 20))
    with pytest.raises(ConfigError, match="of 2 sizes, not one square size: give --image-size"):
        load(root)
    assert load(root, 16).train.images.shape[1:] == (3, 16, 16)
    with pytest.raises(ConfigError, match="at least 1"):
        load(root, 0)


def test_more_than_the_machine_can_hold_is_refused_before_decoding(root: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match=r"20 images of 900000x900000 take .* GB: give a smaller --image-size"):
        load(root, 900_000)


def test_links_are_followed_and_circles_end(root: Path, load: Load) -> None:
    put_class(root.parent / "elsewhere", 10, 120)
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root.parent / "elsewhere" / "back").symlink_to(root.parent / "elsewhere")
    dataset = load(root)
    assert dataset.classes == ("cat", "dog", "linked")
    assert len(dataset.train) + dataset.num_test == 30


def test_other_files_are_passed_over_and_counted(root: Path, load: Load, logged: list[str]) -> None:
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (root / "cat" / name).write_text("x")
    for folder in (".git", "cat/.ipynb_checkpoints", "cat/sub/.thumbnails", ".hidden/sub"):
        put(root / folder / "copy.png")
    (root / "dog" / "LICENSE").write_text("x")
    (root / "dog" / "more.TXT").write_text("x")
    os.mkfifo(root / "dog" / "pipe.png")
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + dataset.num_test == 20
    assert logged[0] == f"folder:{root}: 5 files skipped (.txt, .db, no extension, not a regular file)"


@pytest.mark.parametrize("kind", ["gif", "jfif", "JPG", pytest.param("avif", marks=NEEDS_AVIF)])
def test_a_class_may_be_of_any_kind_of_image(root: Path, load: Load, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, shade, shade)) for shade in (90, 255)]
    for index in range(3):
        frames[0].putpixel((0, 0), (40 * index, 0, 0))
        more = {"save_all": True, "append_images": frames[1:]} if kind in ("gif", "avif") else {}
        (root / "elk").mkdir(exist_ok=True)
        frames[0].save(root / "elk" / f"{index}.{kind}", **({"format": "JPEG"} if kind == "jfif" else more))
    dataset = load(root)
    assert len(dataset.train) + dataset.num_test == 23
    of_elk = dataset.train.images[dataset.train.labels == 2]
    assert bool(((of_elk[:, :, 4:, 4:].int() - 90).abs() <= 30).all())  # the first frame


def test_unreadable_images_are_counted_and_named(root: Path, load: Load) -> None:
    (root / "cat" / "000.png").write_bytes(b"not an image")
    whole = (root / "cat" / "001.png").read_bytes()
    (root / "cat" / "001.png").write_bytes(whole[:50])
    (root / "dog" / "002.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert message.startswith("3 of 20 images cannot be read: ")
    assert str(root / "cat" / "000.png") in message
    assert "\n" not in message


def test_a_truncated_image_is_named(root: Path, load: Load) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    path = root / "dog" / "cut.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"1 of 21 images cannot be read: .*dog/cut\.jpg"):
        load(root)


def test_warnings_come_with_the_files_name(root: Path, load: Load, logged: list[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    damaged = root / "cat" / "damaged.png"
    Image.new("RGB", (8, 8)).save(damaged, exif=exif.tobytes()[:-6])
    load(root)
    assert len(logged) == 2
    assert logged[0].startswith(f"folder:{root}: Pillow warns about 1 of 21 images: {damaged} (Corrupt EXIF data")


def test_large_photographs_are_taken_and_larger_ones_named(
    root: Path, load: Load, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # a photograph of 95 megapixels would take seconds
    put(root / "cat" / "large.png", size=(1000, 950), mode="L")
    load(root, 8)
    assert len(logged) == 1
    put(root / "cat" / "larger.png", size=(2000, 950), mode="L")
    with pytest.raises(
        DataError, match=r"1 of 22 .*: .*larger\.png \(it has more than 1 million pixels: scale it down\)"
    ):
        load(root, 8)


def test_a_link_to_nothing_is_named(root: Path, load: Load) -> None:
    (root / "cat" / "gone.png").symlink_to(root / "nothing.png")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        load(root)


def test_an_empty_class_is_named(root: Path, load: Load) -> None:
    (root / "elk").mkdir()
    with pytest.raises(DataError, match=r"images/elk is an empty class: no image in it; images are \.jpg, "):
        load(root)
    (root / "elk" / "one.svg").write_text("<svg/>")
    with pytest.raises(DataError, match=r"no image in it, only 1 file \(\.svg\); images are \.jpg, "):
        load(root)


def test_a_class_that_training_lacks_is_named(tmp_path: Path, load: Load) -> None:
    for part, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            put_class(tmp_path / "x" / part / name, 2)
    with pytest.raises(DataError, match="test/c is a class that the training images do not have"):
        load(tmp_path / "x")


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("count", [0, 3])
def test_a_part_without_class_folders_is_refused(tmp_path: Path, load: Load, part: str, count: int) -> None:
    for name in ("train/a", "train/b"):
        put_class(tmp_path / "x" / name, 2)
    (tmp_path / "x" / part).mkdir()
    put_class(tmp_path / "x" / part, count)
    with pytest.raises(DataError, match=rf"x/{part} has no class folders, .*: put them in {part}/<class>/"):
        load(tmp_path / "x")


def test_one_class_is_too_few(tmp_path: Path, load: Load) -> None:
    put_class(tmp_path / "x" / "a", 5)
    with pytest.raises(DataError, match="one class only"):
        load(tmp_path / "x")


def test_too_few_images_to_hold_any_out(tmp_path: Path, load: Load) -> None:
    for name in "ab":
        put(tmp_path / "x" / name / "0.png")
        shutil.copy(tmp_path / "x" / name / "0.png", tmp_path / "x" / name / "1.png")
    with pytest.raises(DataError, match="no class of two different images"):
        load(tmp_path / "x")


def test_wrong_paths(tmp_path: Path, root: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match="folder: needs a path"):
        load_dataset("folder:", tmp_path, log=print)
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        load(root / "cat" / "000.png")
    with pytest.raises(ConfigError, match="has no class folders"):
        load(root / "cat")
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
        with pytest.raises(ConfigError, match="may not be read"):
            load(root)
    finally:
        os.seteuid(0)
