"""Images that are in two splits of a data set, twice among the training images, or in two classes.

A model that memorizes a training image classifies its duplicate correctly, so that accuracy is overestimated. Of an
image that is in two classes it gets at least one wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainer.data.content import ImageSet, image_digests

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
_NUM_LISTED = 3


def describe_duplicates(splits: Mapping[str, ImageSet], paths: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    """Yields a line about images in two classes, and about identical images in two splits or among the training images.

    Args:
        splits: `train`, `test` and, for a folder with validation images, `validation`.
        paths: the file of each image of each split.
    """
    digests = {name: image_digests(split.images) for name, split in splits.items()}
    contradictions = _find_contradictions(splits, paths, digests)
    if contradictions:
        listed = "; ".join(f"{one} and {other}" for one, other in list(contradictions.values())[:_NUM_LISTED])
        more = f"; and {len(contradictions) - _NUM_LISTED} more" if len(contradictions) > _NUM_LISTED else ""
        yield (
            f"{len(contradictions)} image{'s contradict' if len(contradictions) > 1 else ' contradicts'} another one "
            f"of another class, pixel for pixel: {listed}{more}; no model can be right about both: remove the wrong one"
        )
    copies = {name: [digest for digest in each if digest not in contradictions] for name, each in digests.items()}
    for name, other, meaning in _OVERLAPS:
        in_other = set(copies.get(other, ()))
        if number := sum(digest in in_other for digest in copies.get(name, ())):
            yield f"{number} of {len(digests[name])} {name} images are {meaning}; remove them from one of the two"
    number = len(copies["train"]) - len(set(copies["train"]))
    if number and "validation" not in splits:
        yield (
            f"{number} training images are duplicates of others, pixel for pixel: some may be set aside for validation "
            "while their duplicates are trained on"
        )


def _find_contradictions(
    splits: Mapping[str, ImageSet], paths: Mapping[str, Sequence[Path]], digests: Mapping[str, list[bytes]]
) -> dict[bytes, tuple[Path, Path]]:
    """Returns the first two files of different classes for each picture that is in several classes."""
    first: dict[bytes, tuple[int, Path]] = {}
    found: dict[bytes, tuple[Path, Path]] = {}
    for name, split in splits.items():
        for digest, label, path in zip(digests[name], split.labels.tolist(), paths[name], strict=True):
            first_label, first_path = first.setdefault(digest, (label, path))
            if label != first_label:
                found.setdefault(digest, (first_path, path))
    return found
