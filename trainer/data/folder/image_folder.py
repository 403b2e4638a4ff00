"""Opens a folder of images, `folder:PATH`, which is decoded once into one file.

Without a test folder, the picture in each file decides whether it is a test image. The name of the decoded file
contains a hash of the listing, so that a folder that has changed is decoded again.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from trainer.data.content import DatasetContent, ImageSet
from trainer.data.decoded_file import DecodedDataset, discard, open_or_create
from trainer.data.folder.decode import decode_images
from trainer.data.folder.duplicates import describe_duplicates
from trainer.data.folder.listing import Listing, list_folder
from trainer.data.folder.probe import BitDepth, Headers, find_bit_depth, probe_images
from trainer.data.folder.workers import list_some
from trainer.data.split import hash_split
from trainer.errors import ConfigError, DataError
from trainer.paths import FOLDER_PREFIX

_MAX_NAME_BYTES = 200
"""Of a folder's name, in the name of the folder for its decoded files: file systems allow 255 bytes in all."""


def load_image_folder(
    root: Path, data_dir: Path, *, image_size: int | None, verify: bool, log: Callable[[str], None]
) -> DecodedDataset:
    """Opens a folder of images, and decodes it first if it is new or has changed.

    Args:
        root: the absolute path of the folder.
        data_dir: folder in which data sets are kept.
        image_size: width and height to which the images are resized; None if they all are squares of one size.
        verify: hashes a decoded file that is there.
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
        lock_path=folder.with_name(f"{folder.name}.lock"),
        expected_sha256=None,
        verify=verify,
        log=log,
    )
    for note in decoded.content.notes:
        log(note)
    return decoded


def decoded_folder(root: Path, data_dir: Path) -> Path:
    """Returns the folder with the decoded files of a folder of images, one for each image size; it may not exist."""
    own_name = os.fsencode(root.name)[:_MAX_NAME_BYTES].decode(errors="ignore")  # torch opens UTF-8 paths only
    return data_dir / "folders" / f"{own_name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"


def _decode(listing: Listing, image_size: int | None, log: Callable[[str], None]) -> DatasetContent:
    name = f"{FOLDER_PREFIX}{listing.root}"
    files = [file for own in listing.splits.values() for file in own]
    headers = probe_images([file.path for file in files], size_given=image_size is not None)
    bit_depth = _find_bit_depth(listing, headers)
    decoded = decode_images(
        [file.path for file in files],
        headers.num_channels,
        image_size or headers.side,
        lambda line: log(f"{name}: {line}"),
        significant_bits=16 if bit_depth is None else bit_depth.significant_bits,
        max_pixels=headers.max_pixels,
    )
    if decoded.warnings:
        listed = list_some(decoded.warnings)
        log(f"warning: {name}: Pillow warns about {len(decoded.warnings)} of {len(files)} images: {listed}")
    notes = [f"{name}: {note}" for note in listing.notes] + list(_describe_bit_depth(name, bit_depth))
    sizes = [len(own) for own in listing.splits.values()]
    positions = dict(zip(listing.splits, torch.arange(len(files)).split(sizes), strict=True))
    if "test" not in positions:
        positions |= _hold_out_test(listing, decoded.digests)
        notes.append(
            f"{name}: no test folder: {len(positions['test'])} of {len(files)} images are held out as test set, "
            "by their content"
        )
    labels = torch.tensor([file.label for file in files], dtype=torch.int64)
    sets = {split: ImageSet(decoded.images[own], labels[own]) for split, own in positions.items()}
    paths = {split: [files[position].path for position in own.tolist()] for split, own in positions.items()}
    notes += [f"warning: {name}: {line}" for line in describe_duplicates(sets, paths)]
    return DatasetContent(
        name,
        listing.classes,
        sets["train"],
        sets["test"],
        sets.get("validation"),
        tuple(notes),
        significant_bits=None if bit_depth is None else bit_depth.significant_bits,
    )


def _find_bit_depth(listing: Listing, headers: Headers) -> BitDepth | None:
    """Returns the bit depth of the training images, or else of other images; None if no image has 16 bits."""
    of_training = [file.path for file in listing.splits["train"] if file.path in headers.of_sixteen_bits]
    paths = of_training or sorted(headers.of_sixteen_bits)
    return find_bit_depth(paths) if paths else None


def _describe_bit_depth(name: str, bit_depth: BitDepth | None) -> Iterator[str]:
    if bit_depth is None:
        return
    bits, number = bit_depth.significant_bits, bit_depth.num_images
    if bits < 16:
        yield f"{name}: {number} training images have 16 bits and use {bits} of them: {2**bits - 1} is white"
    if bit_depth.num_dark > number / 2:
        yield (
            f"warning: {name}: {bit_depth.num_dark} of {number} 16-bit images are nearly black: they use less than a "
            f"sixteenth of the {bits} bits of the brightest one; convert them to 8 bits to use their contrast"
        )


def _hold_out_test(listing: Listing, digests: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the positions of the training and of the test images.

    They are in the order of their content, so that renamed files make the same data set, with the same test set in the
    ledger.

    Args:
        listing: the folder; its training images come first.
        digests: `picture_digest` of each image.
    """
    labels = [file.label for file in listing.splits["train"]]
    held_out = hash_split(digests[: len(labels)], labels)
    if not held_out:
        raise DataError(f"{listing.root} has no class of two different images: too few to hold any out as test set")
    by_content = sorted(range(len(labels)), key=lambda position: (labels[position], digests[position]))
    return {
        "train": torch.tensor([position for position in by_content if digests[position] not in held_out]),
        "test": torch.tensor([position for position in by_content if digests[position] in held_out]),
    }
