"""Opens a folder of images, `folder:PATH`, which is decoded once into one file.

Without a test folder, the content of each image decides whether it is a test image. The name of the decoded file
contains a hash of the listing, so that a folder that has changed is decoded again.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.data.content import DatasetContent, ImageSet
from trainer.data.folder.decode import decode_images, digest_files, probe_images
from trainer.data.folder.duplicates import describe_duplicates
from trainer.data.folder.listing import ImageFile, Listing, list_folder
from trainer.data.split import hash_split
from trainer.data.store import DecodedDataset, discard, open_or_create
from trainer.errors import ConfigError, DataError
from trainer.paths import FOLDER_PREFIX


def load_image_folder(
    root: Path, data_dir: Path, *, image_size: int | None, verify: bool, log: Callable[[str], None]
) -> DecodedDataset:
    """Opens a folder of images, and decodes it first if it is new or has changed.

    Args:
        root: the absolute path of the folder.
        data_dir: where data sets are kept.
        image_size: width and height to which the images are resized; None if they all are squares of one size.
        verify: whether to hash a decoded file that is there.
        log: receives each line for the user.

    Raises:
        ConfigError: there is no such folder of images, its images need an image size or do not fit in memory, or the
            data folder cannot be written.
        DataError: images are missing or cannot be read, or the disk is full.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"an image size must be at least 1, and {image_size} is not")
    listing = list_folder(root)
    folder = decoded_folder(root, data_dir)
    size = "native" if image_size is None else str(image_size)

    def create() -> DatasetContent:
        content = _decode(listing, image_size, log)
        for older in folder.glob(f"{size}-*.pt"):
            discard(older)
        return content

    decoded = open_or_create(
        folder / f"{size}-{listing.key()}.pt",
        create,
        lock_path=folder.with_suffix(".lock"),
        expected_sha256=None,
        verify=verify,
        log=log,
    )
    for note in decoded.content.notes:
        log(note)
    return decoded


def decoded_folder(root: Path, data_dir: Path) -> Path:
    """Returns the folder with the decoded files of a folder of images, one for each image size; it may not exist."""
    return data_dir / "folders" / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"


def _decode(listing: Listing, image_size: int | None, log: Callable[[str], None]) -> DatasetContent:
    name = f"{FOLDER_PREFIX}{listing.root}"
    notes = [f"{name}: {note}" for note in listing.notes]
    splits = dict(listing.splits)
    all_paths = [file.path for files in splits.values() for file in files]
    num_channels, native_size = probe_images(all_paths, size_given=image_size is not None)
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out_test(listing)
        notes.append(
            f"{name}: no test folder: {len(splits['test'])} of {len(all_paths)} images are held out as test set, "
            "by their content"
        )
    files = [file for files in splits.values() for file in files]
    images = decode_images(
        [file.path for file in files], num_channels, image_size or native_size, lambda line: log(f"{name}: {line}")
    )
    labels = torch.tensor([file.label for file in files], dtype=torch.int64)
    sizes = [len(files) for files in splits.values()]
    sets = dict(zip(splits, map(ImageSet, images.split(sizes), labels.split(sizes)), strict=True))
    notes += [f"warning: {name}: {line}" for line in describe_duplicates(sets)]
    return DatasetContent(name, listing.classes, sets["train"], sets["test"], sets.get("validation"), tuple(notes))


def _hold_out_test(listing: Listing) -> tuple[list[ImageFile], list[ImageFile]]:
    """Returns the training and the test images.

    They are in the order of their content, so that renamed files make the same data set, with the same test set in the
    ledger.
    """
    files = listing.splits["train"]
    digests = digest_files([file.path for file in files])
    held_out = hash_split(digests, [file.label for file in files])
    if not held_out:
        raise DataError(f"{listing.root} has no class of two different images: too few to hold any out as test set")
    train_and_test: tuple[list[ImageFile], list[ImageFile]] = [], []
    for digest, file in sorted(zip(digests, files, strict=True), key=lambda pair: (pair[1].label, pair[0])):
        train_and_test[digest in held_out].append(file)
    return train_and_test
