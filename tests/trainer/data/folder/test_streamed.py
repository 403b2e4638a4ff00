"""Images that are decoded when they are taken: the same images, in the same order, as those of a resident set."""

import errno
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.data.folder.image_files import Load, put, put_class
from tests.trainer.data.folder.test_decode import png_of_sixteen_bits
from trainer.data import Dataset, Images, load_dataset
from trainer.data.folder import streamed
from trainer.data.folder.options import FolderOptions
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError, DataError
from trainer.evaluation.ledger import images_sha256
from trainer.recipes.augmentation import Square

PART = (0.1, 0.2, 0.5, 0.6)


def all_of(images: Images) -> torch.Tensor:
    return images.take(torch.arange(len(images)))


def photographs(folder: Path, number: int, seed: int = 0) -> None:
    """Writes JPEGs of several sizes; every third one is turned by its EXIF orientation."""
    stream = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        exif = Image.Exif()
        exif[0x0112] = 6 if index % 3 == 0 else 1
        pixels = stream.randint(0, 256, (5, 7, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((60 + index, 40), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.jpg", exif=exif)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in "ab":
        photographs(tmp_path / "photos" / name, 15, seed=ord(name))
    return tmp_path / "photos"


def assert_same(one: Dataset, other: Dataset) -> None:
    """Compares all splits of two data sets, test images included."""
    pairs = [(one.train, other.train), (load_test_set(one), load_test_set(other))]
    if one.validation is not None:
        assert other.validation is not None
        pairs.append((one.validation, other.validation))
    for mine, theirs in pairs:
        assert torch.equal(all_of(mine), all_of(theirs))
        assert torch.equal(mine.labels, theirs.labels)
        assert (mine.shape, len(mine)) == (theirs.shape, len(theirs))
        assert images_sha256(mine) == images_sha256(theirs)
    assert (one.mean, one.std, one.classes, one.num_test) == (other.mean, other.std, other.classes, other.num_test)
    assert one.sha256 != other.sha256


@pytest.mark.parametrize("square", ["crop", "pad"])
@pytest.mark.parametrize("parts", [(), ("train", "val"), ("train", "val", "test")])
def test_the_source_changes_neither_images_nor_splits(
    tmp_path: Path, load: Load, parts: tuple[str, ...], square: Square
) -> None:
    for part in parts or ("",):
        for name in "ab" if part != "val" else "a":
            photographs(tmp_path / "x" / part / name, 12 if part != "val" else 1, seed=hash_of(part + name))
    resident, streamed = (load(tmp_path / "x", 24, source=source, square=square) for source in ("resident", "streamed"))
    assert (resident.is_streamed, streamed.is_streamed) == (False, True)
    assert_same(resident, streamed)
    assert resident.notes == streamed.notes


def hash_of(text: str) -> int:
    return sum(map(ord, text))


def test_images_of_every_kind_are_those_of_a_viewer(tmp_path: Path, load: Load) -> None:
    x = tmp_path / "x"
    for name in "ab":
        photographs(x / name, 3, seed=ord(name))
    stream = np.random.RandomState(1)
    colour = Image.fromarray(stream.randint(0, 256, (30, 40, 3)).astype(np.uint8))
    colour.convert("CMYK").save(x / "a" / "cmyk.jpg")
    colour.quantize(16).save(x / "a" / "palette.png", transparency=3)
    colour.convert("RGBA").save(x / "a" / "transparent.webp")
    colour.convert("LA").save(x / "b" / "grey.png")
    colour.save(x / "b" / "animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    Image.fromarray(stream.randint(0, 65536, (30, 40)).astype(np.uint16)).save(x / "b" / "deep.png")
    (x / "b" / "deep-colour.png").write_bytes(png_of_sixteen_bits(stream.randint(0, 65536, (30, 40, 3))))
    (x / "b" / "progressive.jpg").write_bytes(b"")
    colour.save(x / "b" / "progressive.jpg", progressive=True, quality=30)
    put(x / "b" / "strip.png", 90, (4000, 2))
    assert_same(*(load(x, 16, source=source) for source in ("resident", "streamed")))


def test_the_sizes_are_those_of_upright_images(photos: Path, load: Load) -> None:
    train = load(photos, 16, source="streamed").train
    turned = {tuple(size) for size in train.sizes.tolist() if size[0] > size[1]}
    assert turned
    assert all(width == 40 and height % 3 == 0 for height, width in turned)
    assert train.sizes.dtype == torch.int32


def test_padded_squares_are_cropped_as_squares(photos: Path, load: Load) -> None:
    cropped, padded = (load(photos, 16, source="streamed", square=square) for square in ("crop", "pad"))
    assert cropped.sha256 != padded.sha256
    assert padded.train.sizes.tolist() == [[max(size)] * 2 for size in cropped.train.sizes.tolist()]
    assert isinstance(padded.train, streamed.FolderImages)
    whole, top = (padded.train.decode(0, box) for box in (None, (0, 0, 0.1, 1)))
    assert (whole[:, 0] == 255).all() or (whole[:, :, 0] == 255).all()
    assert (top == 255).all() == (whole[:, 0] == 255).all()


def test_chunks_are_the_images_in_order(photos: Path, load: Load) -> None:
    train = load(photos, 16, source="streamed").train
    indices = torch.tensor([7, 3, 3, 11, 0])
    chunks = list(train.chunks(indices, 2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat(chunks), train.take(indices))
    assert train.take(indices[:0]).shape == (0, 3, 16, 16)
    next(train.chunks(indices, 1))  # the rest is not decoded


def test_the_rank_says_how_many_threads_decode_for_evaluation(
    photos: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual shards leave torch one thread, for the sake of its sums; decoding may use all of the rank's CPUs."""
    numbers, decode_chunks = [], streamed.decode_chunks

    def counting(*arguments: Any) -> Iterator[torch.Tensor]:
        numbers.append(arguments[-1])
        return decode_chunks(*arguments)

    monkeypatch.setattr(streamed, "decode_chunks", counting)
    dataset = load(photos, 16, source="streamed", num_threads=3)
    numbers.clear()
    assert torch.equal(all_of(dataset.train), all_of(load(photos, 16, source="resident").train))
    all_of(load_test_set(dataset))
    all_of(load(photos, 16, source="streamed").train)
    assert numbers == [3, 3, torch.get_num_threads()]


def test_memory_decides_what_is_streamed(photos: Path, load: Load, logged: list[str]) -> None:
    num_bytes = 30 * 3 * 16 * 16
    assert load(photos, 16, memory=4 * num_bytes - 1).is_streamed
    assert logged[0].startswith(f"folder:{photos}: 30 images of 16x16 pixels")
    assert "streamed from their files (--source resident" in logged[0]
    assert not load(photos, 16, memory=4 * num_bytes).is_streamed
    assert load(photos, 16, memory=4 * num_bytes - 1).is_streamed  # though there is a decoded file
    assert load(photos, 16, source="streamed", memory=10**12).is_streamed
    assert not load(photos, 16, source="resident", memory=1).is_streamed


def test_only_folders_are_streamed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--source streamed is for folders of images"):
        load_dataset("synthetic", tmp_path, FolderOptions(source="streamed"), log=print)


def test_files_decide_the_identity_and_their_names_do_not(photos: Path, load: Load) -> None:
    first = load(photos, 16, source="streamed")
    assert load(photos, 12, source="streamed").sha256 != first.sha256
    for path in sorted(photos.glob("*/*.jpg")):
        path.rename(path.with_name(f"{hash_of(path.name) % 7}-{path.name}"))
    renamed = load(photos, 16, source="streamed")
    assert renamed.sha256 == first.sha256
    assert torch.equal(all_of(renamed.train), all_of(first_again := renamed.train))
    assert len(first_again) == len(first.train)
    photographs(photos / "a", 1, seed=99)
    assert load(photos, 16, source="streamed").sha256 != first.sha256


@pytest.mark.parametrize("change", ["gone", "other bytes", "other bytes later", "damaged in place", "a named pipe"])
def test_a_file_that_changes_while_it_is_used_is_named(photos: Path, load: Load, change: str) -> None:
    train = load(photos, 16, source="streamed").train
    path = train.index.file(int(train.rows[4]))
    status = path.stat()
    if change == "gone":
        path.unlink()
    elif change == "a named pipe":
        path.unlink()
        os.mkfifo(path)
    elif change == "other bytes":
        Image.new("RGB", (8, 8)).save(path)
    elif change == "other bytes later":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        os.utime(path, ns=(1, 1))
    else:
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    expected = {"gone": "is gone since", "damaged in place": "cannot be read any more"}.get(change, "has changed since")
    with pytest.raises(DataError, match=f"{path} {expected}") as caught:
        train.take(torch.arange(10))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=f"{path} {expected}"):
        train.decode(4, PART)
    assert len(train.take(torch.tensor([0, 1, 2, 3, 5]))) == 5


def test_a_copy_of_a_file_is_the_file(photos: Path, load: Load) -> None:
    train = load(photos, 16, source="streamed").train
    expected = all_of(train), train.decode(4, PART)
    for path in photos.glob("*/*.jpg"):
        os.utime(path, ns=(1, 1))
    assert torch.equal(all_of(train), expected[0])
    assert np.array_equal(train.decode(4, PART), expected[1])


def test_a_file_system_that_reads_in_small_pieces_changes_nothing(
    photos: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, read = load(photos, 16, source="streamed").train, os.read
    expected = [train.decode(number, PART) for number in range(3)]
    monkeypatch.setattr(os, "read", lambda file, size: read(file, min(size, 100)))
    for number, pixels in enumerate(expected):
        assert np.array_equal(train.decode(number, PART), pixels)


def test_another_process_gets_images_by_the_path_of_the_index(photos: Path, load: Load) -> None:
    train = load(photos, 16, source="streamed").train
    content = pickle.dumps(train)
    assert len(content) < 4000
    assert torch.equal(all_of(pickle.loads(content)), all_of(train))


def test_statistics_are_those_of_a_sample_that_is_drawn_once(
    photos: Path, load: Load, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load(photos, 16, source="streamed")
    shutil.rmtree(exact.path.parent)
    logged.clear()
    monkeypatch.setattr(streamed, "NUM_SAMPLED", 10)
    of_sample = load(photos, 16, source="streamed")
    assert any(f"those of 10 of {len(exact.train)} training images" in line for line in logged)
    assert of_sample.mean != exact.mean
    assert of_sample.mean == pytest.approx(exact.mean, abs=30)
    assert of_sample.sha256 == exact.sha256
    logged.clear()
    monkeypatch.setattr(streamed, "decode_crop", None)
    assert load(photos, 16, source="streamed").mean == of_sample.mean
    assert len(logged) == 1  # about the test images


def test_a_data_folder_that_others_have_prepared_may_be_read_only(
    photos: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nothing(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    load(photos, 16, source="resident")
    monkeypatch.setattr(streamed, "write_json", write_nothing)
    first, second = load(photos, 16, source="streamed"), load(photos, 16, source="streamed")
    assert (first.mean, first.notes) == (second.mean, second.notes)


def test_an_index_in_use_stays_whatever_others_do_with_the_folder(photos: Path, load: Load) -> None:
    first = load(photos, 16, source="streamed")
    load(photos, 12, source="resident")
    photographs(photos / "c", 3)
    for source in ("resident", "streamed"):
        assert load(photos, 16, source=source).classes == ("a", "b", "c")
    assert len(load_test_set(first)) == first.num_test


def test_a_deleted_index_is_one_line(photos: Path, load: Load) -> None:
    dataset = load(photos, 16, source="streamed")
    dataset.path.unlink()
    with pytest.raises(DataError, match="has been deleted while it was in use"):
        load_test_set(dataset)


def test_warnings_about_identical_images_are_those_of_a_resident_set(tmp_path: Path, load: Load) -> None:
    for part in ("train", "test"):
        for name in "ab":
            put_class(tmp_path / "x" / part / name, 4)
    shutil.copy(tmp_path / "x/train/a/001.png", tmp_path / "x/test/a/copy.png")
    shutil.copy(tmp_path / "x/train/a/002.png", tmp_path / "x/train/b/other.png")
    resident, streamed = (load(tmp_path / "x", source=source) for source in ("resident", "streamed"))
    assert resident.notes == streamed.notes
    assert len(resident.notes) == 2
