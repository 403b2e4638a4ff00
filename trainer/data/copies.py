"""Copies of images among the parts of a data set: what was learnt by heart would be counted as understood."""

import hashlib
from collections.abc import Iterator

import torch

from trainer.data.store import ImageSet

_HARMS = (
    ("validation", "train", "validation accuracy will count them as understood; leave them out of either"),
    ("test", "train", "test accuracy will count them as understood; leave them out of either"),
    ("test", "validation", "what is chosen by validation is chosen by them, too; leave them out of either"),
)
"""Whose images are whose, too, and what comes of it."""


def describe_copies(parts: dict[str, ImageSet]) -> Iterator[str]:
    """A line for each pair of parts, and for the training images alone, that have images of the same pixels in common.

    Args:
        parts: `train`, `test` and, where people have chosen them, `validation`.
    """
    digests = {name: [_digest(image) for image in part.images] for name, part in parts.items()}
    for name, of, harm in _HARMS:
        there = set(digests.get(of, ()))
        if number := sum(digest in there for digest in digests.get(name, ())):
            whose = f"{number} of {len(digests[name])} {name} images are {of} images"
            yield f"{whose.replace('train images', 'training images')}, too, pixel for pixel: {harm}"
    number = len(digests["train"]) - len(set(digests["train"]))
    if number and "validation" not in parts:
        yield (
            f"{number} training images are copies of others, pixel for pixel: some may be set aside for validation "
            "while their copies teach"
        )


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.sha256(image.numpy().data).digest()
