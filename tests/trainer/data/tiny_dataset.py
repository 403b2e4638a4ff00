"""A tiny published data set, and limits for its downloads."""

import hashlib

import numpy as np
import torch

from trainer.data.content import DatasetContent, ImageSet, content_digest
from trainer.data.published.collect import KnownFile
from trainer.data.published.download import DownloadLimits
from trainer.data.published.formats import decode_idx
from trainer.data.published.info import DatasetInfo, FileFormat
from trainer.data.published.sources import LocalFiles, Source

QUICK = DownloadLimits(connect_s=1.0, grace_s=0.05, window_s=0.15, min_bytes_per_s=100_000, num_retries=2)
"""Fractions of a second instead of seconds."""
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
GZ_NAMES = tuple(f"{name}.gz" for name in NAMES)


def make_content(side: int = 8, num_train: int = 40, num_test: int = 20, seed: int = 0) -> DatasetContent:
    """Returns random images of two classes."""
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        ImageSet(
            torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=generator),
            torch.arange(count) % 2,
        )
        for count in (num_train, num_test)
    )
    return DatasetContent("tiny", ("even", "odd"), train, test)


def idx_bytes(array: np.ndarray) -> bytes:
    """Returns an IDX file of unsigned bytes."""
    shape = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + array.astype(np.uint8).tobytes()


def idx_files(content: DatasetContent) -> dict[str, bytes]:
    """Returns the four files of a data set by name."""
    arrays = []
    for part in (content.train, content.test):
        arrays += [part.images[:, 0].numpy(), part.labels.numpy()]
    return {name: idx_bytes(array) for name, array in zip(NAMES, arrays, strict=True)}


def make_dataset_info(*sources: Source, content: DatasetContent | None = None) -> DatasetInfo:
    """Returns a data set that is published as MNIST is."""
    content = content or make_content()
    files = tuple(
        KnownFile(name, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
        for name, data in idx_files(content).items()
    )
    _, channels, height, width = content.train.images.shape
    return DatasetInfo(
        name="tiny",
        classes=content.classes,
        image_shape=(channels, height, width),
        num_train=len(content.train),
        num_test=len(content.test),
        sha256=content_digest(content),
        formats=(FileFormat(files, decode_idx),),
        sources=(LocalFiles(("tiny", "Tiny/raw")), *sources),
    )
