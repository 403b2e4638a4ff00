"""Splits the files of a folder into training, validation and test images, in the order of the data set.

A resident and a streamed set of one folder have the same images in the same order. Without a test folder, the picture
in each file decides whether it is a test image.
"""

import numpy as np
import torch

from trainer.data.folder.index import DECODED, SPLITS, FolderIndex
from trainer.data.split import as_strings, hash_split
from trainer.errors import DataError


def split_rows(index: FolderIndex) -> dict[str, torch.Tensor]:
    """Returns the positions in the index of the images of each split, int64, in order; there always is a `test`.

    Files that cannot be decoded are left out. A split with a folder is in the order of its listing. Where test images
    are held out, training and test images are in the order of their content, so that renamed files make the same data
    set, with the same test set in the ledger.

    Args:
        index: a complete one.

    Raises:
        DataError: a split or a class of the training images has no image that can be decoded, or no image can be held
            out.
    """
    is_decoded, splits, labels = index.has(DECODED), index.splits.numpy(), index.labels.numpy()
    rows = {}
    for number, name in enumerate(SPLITS):
        if (splits == number).any():
            rows[name] = np.flatnonzero(is_decoded & (splits == number))
            if len(rows[name]) == 0:
                raise DataError(f"{index.root}: none of its {name} images can be read")
    counts = np.bincount(labels[rows["train"]], minlength=len(index.classes))
    if not counts.all():
        raise DataError(f"{index.root}: no training image of class {index.classes[int(counts.argmin())]} can be read")
    if "test" not in rows:
        train = rows["train"]
        digests = index.picture_sha256.numpy()[train]
        order = np.lexsort((as_strings(digests), labels[train]))
        is_held_out = hash_split(digests, labels[train])[order]
        rows["train"], rows["test"] = train[order][~is_held_out], train[order][is_held_out]
        if len(rows["test"]) == 0:
            raise DataError(f"{index.root} has no class of two different images: too few to hold any out as test set")
    return {name: torch.from_numpy(rows[name]) for name in SPLITS if name in rows}


def has_test_folder(index: FolderIndex) -> bool:
    return bool((index.splits.numpy() == SPLITS.index("test")).any())
