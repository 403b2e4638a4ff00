"""The content of a data set: images and labels of its splits, and their digest."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images, uint8 [N, C, H, W], and labels, int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


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
    """Bits of 16-bit files that the training images use: the largest number of so many bits became white. None without
    such files."""

    def splits(self) -> dict[str, ImageSet]:
        """Returns the splits by name, in the order in which they are hashed; `validation` only where there is one."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


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
