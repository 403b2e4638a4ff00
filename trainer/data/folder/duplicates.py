"""Images that are in two splits of a data set, twice among the training images, or in two classes.

A model that memorizes a training image classifies its duplicate correctly, so that accuracy is overestimated. Of an
image that is in two classes it gets at least one wrong.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.split import as_strings
from trainer.errors import list_names

_OVERLAPS = (
    ("validation", "train", "training images, too, pixel for pixel: validation accuracy will be too high"),
    ("test", "train", "training images, too, pixel for pixel: test accuracy will be too high"),
    (
        "test",
        "validation",
        "validation images, too, pixel for pixel: a model chosen by validation accuracy is chosen by them, too",
    ),
)
"""A split, another one, and the consequence of images that both have."""

Digests = npt.NDArray[np.uint8]
"""SHA-256 of pictures, [N, 32]."""


def describe_duplicates(
    digests: Mapping[str, Digests], labels: Mapping[str, torch.Tensor], path: Callable[[str, int], Path]
) -> Iterator[str]:
    """Yields a line about images in two classes, and about identical images in two splits or among the training images.

    Args:
        digests: those of the pictures of `train`, `test` and, for a folder with validation images, `validation`.
        labels: int64 [N] for each split.
        path: returns the file of an image, from its split and its position there.
    """
    _, pictures = np.unique(as_strings(np.concatenate(list(digests.values()))), return_inverse=True)
    classes = np.concatenate([labels[name].numpy() for name in digests])
    contradicted = _contradictions(pictures, classes)
    ends = np.cumsum([len(each) for each in digests.values()])
    if number := int(contradicted.sum()):
        names, starts = list(digests), np.array([0, *ends])

        def file(position: int) -> Path:
            split = int(np.searchsorted(ends, position, side="right"))
            return path(names[split], position - int(starts[split]))

        pairs = [f"{file(one)} = {file(other)}" for one, other in _first_pairs(pictures, classes, contradicted)]
        yield (
            f"{number} image{'s are' if number > 1 else ' is'} in two classes, pixel for pixel: "
            f"{list_names(pairs)}; no model can be right about both: remove the wrong one"
        )
    by_split = dict(zip(digests, np.split(pictures, ends[:-1]), strict=True))
    copies = {name: own[~contradicted[own]] for name, own in by_split.items()}
    for name, other, meaning in _OVERLAPS:
        if name in copies and other in copies and (number := int(np.isin(copies[name], copies[other]).sum())):
            yield f"{number} of {len(by_split[name])} {name} images are {meaning}; remove them from one of the two"
    number = len(copies["train"]) - len(np.unique(copies["train"]))
    if number and "validation" not in digests:
        are = "s are duplicates of others" if number > 1 else " is a duplicate of another one"
        yield f"{number} training image{are}, pixel for pixel: validation may get what is also trained on"


def _contradictions(pictures: npt.NDArray[np.int64], classes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Returns whether each picture, by its number, is in several classes."""
    number = int(pictures.max(initial=-1)) + 1
    lowest, highest = np.full(number, np.iinfo(np.int64).max), np.full(number, -1)
    np.minimum.at(lowest, pictures, classes)
    np.maximum.at(highest, pictures, classes)
    found: npt.NDArray[np.bool_] = lowest != highest
    return found


def _first_pairs(
    pictures: npt.NDArray[np.int64], classes: npt.NDArray[np.int64], contradicted: npt.NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Returns the positions of the first two images of different classes for each such picture."""
    first: dict[int, int] = {}
    found: dict[int, tuple[int, int]] = {}
    for position in np.flatnonzero(contradicted[pictures]).tolist():
        picture = int(pictures[position])
        earlier = first.setdefault(picture, position)
        if classes[position] != classes[earlier]:
            found.setdefault(picture, (earlier, position))
    return list(found.values())
