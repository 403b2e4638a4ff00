"""Published formats, good and damaged."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.data.tiny_dataset import NAMES, idx_files, make_content
from trainer.data.published import formats
from trainer.errors import DataError

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write(folder: Path, files: dict[str, bytes]) -> dict[str, Path]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}


def test_idx(tmp_path: Path) -> None:
    content = make_content()
    train, test = formats.decode_idx(write(tmp_path, idx_files(content)))
    assert torch.equal(train.images, content.train.images)
    assert torch.equal(test.labels, content.test.labels)
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\0\0\x09\x03" + data[4:],
        lambda data: data[:4] + b"\xff" * 12 + data[16:],
    ],
)
def test_broken_idx_is_named(tmp_path: Path, damage: Any) -> None:
    files = idx_files(make_content())
    files[NAMES[0]] = damage(files[NAMES[0]])
    with pytest.raises(DataError, match=NAMES[0]):
        formats.decode_idx(write(tmp_path, files))


def test_idx_with_fewer_labels_than_images(tmp_path: Path) -> None:
    files = idx_files(make_content())
    files[NAMES[1]] = idx_files(make_content(num_train=39))[NAMES[1]]
    with pytest.raises(DataError, match="40 images come with 39 labels"):
        formats.decode_idx(write(tmp_path, files))


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 does: the official batches were pickled with it."""

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)  # type: ignore[attr-defined]

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}  # type: ignore[dict-item]


def pickle_batch(images: np.ndarray, labels: list[int]) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump({b"data": images.reshape(len(images), -1), b"labels": labels})
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def test_cifar_batches(tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (6, 4, 3, 32, 32)).astype(np.uint8)
    files = {name: pickle_batch(batch, [3, 1, 2, 0]) for name, batch in zip(BATCHES, images, strict=True)}
    train, test = formats.decode_cifar_batches(write(tmp_path, files))
    assert np.array_equal(train.images.numpy(), images[:5].reshape(20, 3, 32, 32))
    assert np.array_equal(test.images.numpy(), images[5])
    assert train.labels.tolist() == [3, 1, 2, 0] * 5


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched-by-a-pickle"),)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil(), 2),
        pickle.dumps({}, 2),
        b"",
        b"rubbish",
        pickle.dumps([1], 2),
        b"\x80\2J\xff\xff\xff\x7f]Q.",
    ],
)
def test_a_file_that_is_no_batch_is_named_and_runs_no_code(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = dict.fromkeys(BATCHES, data)
    with pytest.raises(DataError, match="data_batch_1 is not a batch of CIFAR-10"):
        formats.decode_cifar_batches(write(tmp_path, files))
    assert not (tmp_path / "touched-by-a-pickle").exists()


def png_rows(images: np.ndarray, mode: str = "RGB") -> bytes:
    rows = images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)
    buffer = io.BytesIO()
    Image.fromarray(rows).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_cifar_pngs(tmp_path: Path, mode: str) -> None:
    images = np.random.RandomState(0).randint(0, 256, (6, 4, 3, 32, 32)).astype(np.uint8)
    files = {f"{name}.png": png_rows(batch, mode) for name, batch in zip(BATCHES, images, strict=True)}
    files["train_lables.json"] = json.dumps([3, 1, 2, 0] * 5).encode()
    files["test_lables.json"] = b"[1, 2, 3, 4]"
    train, test = formats.decode_cifar_pngs(write(tmp_path, files))
    assert np.array_equal(train.images.numpy(), images[:5].reshape(20, 3, 32, 32))
    assert np.array_equal(test.images.numpy(), images[5])
    assert test.labels.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 20, 400])
def test_truncated_png_is_named(tmp_path: Path, keep: int) -> None:
    images = np.random.RandomState(0).randint(0, 256, (4, 3, 32, 32)).astype(np.uint8)
    files = {f"{name}.png": png_rows(images) for name in BATCHES}
    files["data_batch_3.png"] = files["data_batch_3.png"][:keep]
    with pytest.raises(DataError, match=r"data_batch_3\.png cannot be read"):
        formats.decode_cifar_pngs(write(tmp_path, files))


@pytest.mark.parametrize("channels", [None, 3])
def test_npz(tmp_path: Path, channels: int | None) -> None:
    shape = (5, 8, 6) if channels is None else (5, 8, 6, channels)
    images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    labels = np.arange(5, dtype=np.uint8)[:, None]
    np.savez(tmp_path / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    train, _ = formats.decode_npz(tmp_path / "x.npz")
    assert train.images.shape == (5, channels or 1, 8, 6)
    assert train.images[1, 0, 2, 3] == (images[1, 2, 3] if channels is None else images[1, 2, 3, 0])
    assert train.labels.tolist() == [0, 1, 2, 3, 4]


def test_a_file_that_is_no_npz_or_holds_objects_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 rubbish")
    np.savez(tmp_path / "b.npz", x_train=np.array([{}], dtype=object))
    np.savez(tmp_path / "c.npz", x=np.zeros(1))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000, 1000000, 28), }"
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
    for name in ("a.npz", "b.npz", "c.npz", "huge.npz", "missing.npz"):
        with pytest.raises(DataError, match=name):
            formats.decode_npz(tmp_path / name)
