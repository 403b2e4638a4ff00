"""Copies of images among the parts of a data set: what was learnt by heart would be counted as understood."""

import hashlib
from collections.abc import Iterator

import torch

from trainer.data.store import ImageSet


def describe_copies(parts: dict[str, ImageSet]) -> Iterator[str]:
    """A line for each pair of parts, and for the training images alone, that have images of the same pixels in common.

    Args:
        parts: `train`, `test` and, where people have chosen them, `validation`.
    """
    digests = {name: [_digest(image) for image in part.images] for name, part in parts.items()}
    known = set(digests["train"])
    for name, theirs in digests.items():
        if name != "train" and (number := sum(digest in known for digest in theirs)):
            yield (
                f"{number} of {len(theirs)} {name} images are training images, too, pixel for pixel: "
                f"{name} accuracy will count them as understood; leave them out of either"
            )
    number = len(digests["train"]) - len(known)
    if number and "validation" not in parts:
        yield (
            f"{number} training images are copies of others, pixel for pixel: some may be set aside for validation "
            "while their copies teach"
        )


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.sha256(image.numpy().data).digest()
