"""A data set as values: its images and labels, its splits, and their digests."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

_CHUNK_SIZE = 256


class Images(Protocol):
    """Labelled images of one size, in memory or decoded when they are taken."""

    @property
    def labels(self) -> torch.Tensor:
        """Int64 [N], on the CPU."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""

    def __len__(self) -> int: ...

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns images, uint8 [B, C, H, W] on the CPU.

        Args:
            indices: int64 [B].

        Raises:
            DataError: a file has changed or is gone since the data set was opened.
        """

    def chunks(self, indices: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """Yields the images in order, `size` at a time; the last chunk may be smaller.

        Where images are decoded, the next chunk is decoded while the caller works.

        Args:
            indices: int64 [N].
            size: number of images of a chunk.
        """

    def digests(self, indices: torch.Tensor) -> list[bytes]:
        """Returns a SHA-256 for each image, by which the ledger recognises a test set."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images, uint8 [N, C, H, W], in memory or mapped from a file, and labels, int64 [N]; implements `Images`."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        num_channels, height, width = self.images.shape[1:]
        return num_channels, height, width

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        return self.images[indices]

    def chunks(self, indices: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        for start in range(0, len(indices), size):
            yield self.take(indices[start : start + size])

    def digests(self, indices: torch.Tensor) -> list[bytes]:
        return [digest for chunk in self.chunks(indices, _CHUNK_SIZE) for digest in image_digests(chunk)]


@dataclass(frozen=True, slots=True)
class DatasetContent:
    """A whole data set in memory or mapped from its decoded file."""

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    validation: ImageSet | None = None
    notes: tuple[str, ...] = ()
    """Lines that every user of the data set should read: files that were skipped, images that are in two splits."""
    significant_bits: int | None = None
    """Number of bits that the values of the training images' 16-bit files need: the largest number that these bits hold
    became white. None without such files."""
    num_skipped: int = 0
    """Files that are left out because they cannot be decoded."""

    def splits(self) -> dict[str, ImageSet]:
        """Returns the splits by name, in the order in which they are hashed; `validation` only where there is one."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


@dataclass(frozen=True, slots=True)
class Dataset:
    """Everything about a data set except its test images. Tensors may be mapped from `path`: do not write to them."""

    name: str
    classes: tuple[str, ...]
    sha256: str
    """Of the decoded content, test images included."""
    train: Images
    validation: Images | None
    """For a folder that has validation images; for the others a run sets some of `train` aside."""
    num_test: int
    path: Path | None
    """The decoded file, or the index of a streamed folder; None after `without_test_images`."""
    mean: tuple[float, ...]
    """Of each channel of the training images, 0 to 255, including those set aside for validation. Of a streamed folder,
    of a sample."""
    std: tuple[float, ...]
    """Standard deviation, likewise."""
    notes: tuple[str, ...] = ()
    """As in `DatasetContent`."""
    significant_bits: int | None = None
    """As in `DatasetContent`."""

    @property
    def is_streamed(self) -> bool:
        """Whether images are decoded when they are taken, instead of being in memory."""
        return not isinstance(self.train, ImageSet)


def image_digests(images: torch.Tensor) -> list[bytes]:
    """Returns the SHA-256 of each image's pixels.

    Args:
        images: uint8 `[N, C, H, W]`.
    """
    return [hashlib.sha256(image.contiguous().numpy().data).digest() for image in images]


def content_digest(content: DatasetContent) -> str:
    """Returns the SHA-256, in hex, over the name, dtype, shape and bytes of each tensor, in a fixed order."""
    digest = hashlib.sha256()
    for name, split in content.splits().items():
        for field, tensor in (("images", split.images), ("labels", split.labels)):
            header = f"{name}.{field} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n"
            digest.update(header.encode())
            if tensor.numel():
                digest.update(tensor.contiguous().numpy().data)  # the tensor's own memory: no copy
    return digest.hexdigest()
