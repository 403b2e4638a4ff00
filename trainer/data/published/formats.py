"""Decoders of the files in which MNIST, Fashion-MNIST and CIFAR-10 are published.

A decoder runs no code that the files contain, and raises a DataError that names a malformed file. The caller has
verified the files by their digests, or verifies the decoded content.
"""

import io
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.content import ImageSet
from trainer.errors import DataError

Bytes = npt.NDArray[np.uint8]
TrainAndTest = tuple[ImageSet, ImageSet]
"""Training images and test images."""

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def decode_idx(files: Mapping[str, Path]) -> TrainAndTest:
    """Decodes the four IDX files of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist/)."""
    return _idx_pair(files, "train"), _idx_pair(files, "t10k")


def decode_cifar_batches(files: Mapping[str, Path]) -> TrainAndTest:
    """Decodes the six pickled batches of CIFAR-10's Python archive (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    train = [_read_batch(files[name]) for name in _CIFAR_BATCHES]
    images, labels = zip(*train, strict=True)
    test = _read_batch(files["test_batch"])
    return _image_set(np.concatenate(images), np.concatenate(labels)), _image_set(*test)


def decode_cifar_pngs(files: Mapping[str, Path]) -> TrainAndTest:
    """Decodes six PNGs of CIFAR-10, one image of 1,024 RGB pixels in each row, and labels as JSON lists."""
    train = np.concatenate([_read_rows(files[f"{name}.png"]) for name in _CIFAR_BATCHES])
    test = _read_rows(files["test_batch.png"])
    return (
        _image_set(train, _read_json_labels(files["train_lables.json"])),  # sic
        _image_set(test, _read_json_labels(files["test_lables.json"])),
    )


def decode_npz(path: Path) -> TrainAndTest:
    """Decodes an archive in Keras's form.

    Args:
        path: holds x_train and x_test, uint8 [N, H, W] or [N, H, W, C], and y_train and y_test.

    Raises:
        DataError: the file is no such archive.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return (
                _image_set(_channels_first(arrays["x_train"]), arrays["y_train"].reshape(-1)),
                _image_set(_channels_first(arrays["x_test"]), arrays["y_test"].reshape(-1)),
            )
    except Exception as error:  # of every kind, for a damaged file
        raise DataError(f"{path} does not hold x_train, y_train, x_test and y_test ({error})") from error


def _idx_pair(files: Mapping[str, Path], part: str) -> ImageSet:
    images = _read_idx(files[f"{part}-images-idx3-ubyte"], num_dimensions=3)
    labels = _read_idx(files[f"{part}-labels-idx1-ubyte"], num_dimensions=1)
    return _image_set(images[:, None], labels)


def _read_idx(path: Path, num_dimensions: int) -> Bytes:
    data = path.read_bytes()
    header_bytes = 4 + 4 * num_dimensions
    if len(data) < header_bytes or data[:4] != bytes((0, 0, 8, num_dimensions)):
        raise DataError(f"{path} is not an IDX file of unsigned bytes with {num_dimensions} dimension(s)")
    shape = struct.unpack(f">{num_dimensions}I", data[4:header_bytes])
    expected = header_bytes + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise DataError(f"{path} has {len(data)} bytes where its header promises {expected}")
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape).copy()


class _BatchUnpickler(pickle.Unpickler):
    """Builds arrays and nothing else: a plain unpickler calls any function that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return allowed[module, name]


def _empty_array(kind: type, _shape: object, _code: object) -> npt.NDArray[Any]:
    return np.ndarray.__new__(kind, (0,), np.uint8)  # the pickle sets its state afterwards


def _read_batch(path: Path) -> tuple[Bytes, npt.NDArray[np.int64]]:
    try:
        batch = _BatchUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images = np.asarray(batch[b"data"], np.uint8).reshape(-1, *_CIFAR_SHAPE)
        return images, np.asarray(batch[b"labels"], np.int64)
    except Exception as error:
        raise DataError(f"{path} is not a batch of CIFAR-10 ({error})") from error


def _read_rows(path: Path) -> Bytes:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:
        raise DataError(f"{path} cannot be read as a PNG ({error})") from error
    if pixels.shape[1] != 1024:
        raise DataError(f"{path} is {pixels.shape[1]} pixels wide where a row must be 1,024")
    return np.ascontiguousarray(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def _read_json_labels(path: Path) -> npt.NDArray[np.int64]:
    try:
        return np.asarray(json.loads(path.read_text(encoding="utf-8")), np.int64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path} is not a JSON list of labels ({error})") from error


def _channels_first(images: npt.NDArray[Any]) -> Bytes:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"images are {images.dtype} {images.shape}")
    return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _image_set(images: Bytes, labels: npt.NDArray[Any]) -> ImageSet:
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images come with {len(labels)} labels")
    return ImageSet(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))
