"""Copies of images among the parts of a data set: what was learnt by heart would be counted as understood."""

import hashlib
from collections.abc import Iterator

import torch

from trainer.data.store import ImageSet

_SHARED = (
    ("validation", "train", "training images, too, pixel for pixel: validation accuracy will count them as understood"),
    ("test", "train", "training images, too, pixel for pixel: test accuracy will count them as understood"),
    (
        "test",
        "validation",
        "validation images, too, pixel for pixel: what is chosen by validation is chosen by them, too",
    ),
)
"""A part, another one, and what it means where they have images in common."""


def describe_copies(parts: dict[str, ImageSet]) -> Iterator[str]:
    """A line for each pair of parts, and for the training images alone, that have images of the same pixels in common.

    Args:
        parts: `train`, `test` and, where people have chosen them, `validation`.
    """
    digests = {name: image_digests(part.images) for name, part in parts.items()}
    for name, other, meaning in _SHARED:
        there = set(digests.get(other, ()))
        if number := sum(digest in there for digest in digests.get(name, ())):
            yield f"{number} of {len(digests[name])} {name} images are {meaning}; leave them out of either"
    number = len(digests["train"]) - len(set(digests["train"]))
    if number and "validation" not in parts:
        yield (
            f"{number} training images are copies of others, pixel for pixel: some may be set aside for validation "
            "while their copies teach"
        )


def image_digests(images: torch.Tensor) -> list[bytes]:
    """SHA-256 of the pixels of each of the images, uint8 `[N, C, H, W]`."""
    return [hashlib.sha256(image.contiguous().numpy().data).digest() for image in images]
