"""Images that are in two splits of a data set, or twice among the training images.

A model that memorizes a training image classifies its duplicate correctly, so that accuracy is overestimated.
"""

import hashlib
from collections.abc import Iterator

import torch

from trainer.data.content import ImageSet

_OVERLAPS = (
    ("validation", "train", "training images, too, pixel for pixel: validation accuracy will be too high"),
    ("test", "train", "training images, too, pixel for pixel: test accuracy will be too high"),
    (
        "test",
        "validation",
        "validation images, too, pixel for pixel: a model chosen by validation accuracy is chosen by them, too",
    ),
)
"""A split, another one, and what it means if they have images in common."""


def describe_duplicates(splits: dict[str, ImageSet]) -> Iterator[str]:
    """Yields a line for each pair of splits with identical images, and one for duplicates among the training images.

    Args:
        splits: `train`, `test` and, for a folder with validation images, `validation`.
    """
    digests = {name: image_digests(split.images) for name, split in splits.items()}
    for name, other, meaning in _OVERLAPS:
        in_other = set(digests.get(other, ()))
        if number := sum(digest in in_other for digest in digests.get(name, ())):
            yield f"{number} of {len(digests[name])} {name} images are {meaning}; remove them from one of the two"
    number = len(digests["train"]) - len(set(digests["train"]))
    if number and "validation" not in splits:
        yield (
            f"{number} training images are duplicates of others, pixel for pixel: some may be set aside for validation "
            "while their duplicates are trained on"
        )


def image_digests(images: torch.Tensor) -> list[bytes]:
    """Returns the SHA-256 of each image's pixels.

    Args:
        images: uint8 `[N, C, H, W]`.
    """
    return [hashlib.sha256(image.contiguous().numpy().data).digest() for image in images]
