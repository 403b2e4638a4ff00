"""Opens a folder of images, `folder:PATH`: resident, decoded once into one file, or streamed, decoded on demand.

The names of the decoded file and of the index contain a hash of the listing, so that a folder that has changed is
read again.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from convoy.cpus import available_memory
from convoy.printable import printable
from trainer.data.content import Dataset, DatasetContent, ImageSet, image_digests
from trainer.data.decoded_file import open_decoded, open_or_create
from trainer.data.folder.decode import decode_pixels, select_images
from trainer.data.folder.duplicates import Digests, describe_duplicates
from trainer.data.folder.index import FolderIndex, index_path, open_index, save_index
from trainer.data.folder.indexing import (
    check_problems,
    complete_index,
    log_warnings,
    open_or_make_index,
    open_or_make_index_locked,
)
from trainer.data.folder.listing import Listing, list_folder
from trainer.data.folder.options import FolderOptions
from trainer.data.folder.probe import BitDepth, common_side, find_bit_depth
from trainer.data.folder.splits import has_test_folder, split_rows
from trainer.data.folder.streamed import FolderImages, open_streamed
from trainer.data.folder.workers import list_some
from trainer.data.mapped_file import DamagedFileError, discard
from trainer.errors import ConfigError, DataError
from trainer.paths import FOLDER_PREFIX

_MAX_NAME_BYTES = 200
"""Of a folder's name, in the name of the folder for its decoded files: file systems allow 255 bytes in all."""
_SKIPPING = "skipping"
"""At the end of the name of a decoded file that lacks some of the images."""


def load_image_folder(
    root: Path, data_dir: Path, options: FolderOptions, *, verify: bool, log: Callable[[str], None]
) -> Dataset:
    """Opens a folder of images, and reads its files first if it is new or has changed.

    Args:
        root: the absolute path of the folder.
        data_dir: folder in which data sets are kept.
        options: how to open it.
        verify: hashes a decoded file that is there.
        log: receives each line for the user.

    Raises:
        ConfigError: there is no such folder of images, its images need an image size or do not fit in memory, or the
            data folder cannot be written.
        DataError: images are missing or cannot be read, or the disk is full.
    """
    if options.image_size is not None and options.image_size < 1:
        raise ConfigError(f"an image size must be at least 1, and {options.image_size} is not")
    if options.skip_bad_images < 0:
        raise ConfigError(f"--skip-bad-images {options.skip_bad_images}: must be at least 0")
    folder = _ImageFolder(root, data_dir, options, log)
    if options.source != "streamed" and (known := folder.open_known(verify=verify)) is not None:
        return known
    index = folder.find_index()
    shape = folder.image_shape(index)
    num_bytes = len(index) * math.prod(shape)
    is_resident = options.source == "resident" or (options.source == "auto" and options.fits(num_bytes))
    _check_memory(len(index) if is_resident else 1, shape)
    if is_resident:
        return folder.open_resident(verify=verify)
    if options.source == "auto":
        log(
            f"{folder.name}: {len(index):,} images of {shape[1]}x{shape[2]} pixels, {num_bytes / 1e9:.1f} GB: "
            "streamed from their files (--source resident keeps them in memory)"
        )
    return folder.open_streamed(index)


def decoded_folder(root: Path, data_dir: Path) -> Path:
    """Returns the folder with the decoded files of a folder of images, one for each image size; it may not exist."""
    own_name = os.fsencode(root.name)[:_MAX_NAME_BYTES].decode(errors="ignore")  # torch opens UTF-8 paths only
    return data_dir / "folders" / f"{own_name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"


class _ImageFolder:
    """A folder of images, and where Convoy keeps its index and its decoded images."""

    def __init__(self, root: Path, data_dir: Path, options: FolderOptions, log: Callable[[str], None]) -> None:
        self.name = f"{FOLDER_PREFIX}{root}"
        self.options = options
        self.log = log
        self.cache = decoded_folder(root, data_dir)
        key = None if options.known_path is None else _listing_key(options.known_path)
        self.listing: Listing | None = None
        if key is None or not index_path(self.cache, key).exists():
            self.listing = list_folder(root)
            key = self.listing.key
        self.key = key
        self.lock_path = self.cache.with_name(f"{self.cache.name}.lock")
        self.size_name = "native" if options.image_size is None else str(options.image_size)
        if options.square == "pad":
            self.size_name = f"padded-{self.size_name}"
        self.decoded_path = self.cache / f"{self.size_name}-{self.key}.pt"
        if options.skip_bad_images and not self.decoded_path.exists():  # a file without images left out serves both
            self.decoded_path = self.decoded_path.with_stem(f"{self.decoded_path.stem}-{_SKIPPING}")

    def _log(self, line: str) -> None:
        self.log(_prefixed(self.name, line))

    def open_known(self, *, verify: bool) -> Dataset | None:
        """Opens the decoded file if there is one, and images of its size are kept resident; returns None if not."""
        with suppress(FileNotFoundError, DamagedFileError):
            splits = open_decoded(self.decoded_path, verify=False).content.splits().values()
            if self.options.source == "resident" or self.options.fits(sum(split.images.nbytes for split in splits)):
                return self.open_resident(verify=verify)
        return None

    def find_index(self) -> FolderIndex:
        """Opens the index of the listing, and makes it first where it is missing."""
        if self.listing is None:
            return open_index(index_path(self.cache, self.key))
        return open_or_make_index(self.listing, self.cache, self.lock_path, self._log)

    def image_shape(self, index: FolderIndex) -> tuple[int, int, int]:
        """Returns the shape of the images, (C, H, W)."""
        side = self.options.image_size or common_side(index)
        return index.num_channels, side, side

    def open_resident(self, *, verify: bool) -> Dataset:
        """Opens the decoded file, and creates it first where it is missing."""
        decoded = open_or_create(
            self.decoded_path, self._decode, lock_path=self.lock_path, expected_sha256=None, verify=verify, log=self.log
        )
        number = decoded.content.num_skipped
        if number > self.options.skip_bad_images:
            raise DataError(f"{self.name}: {number} images cannot be read; --skip-bad-images {number} leaves them out")
        for note in decoded.content.notes:
            self.log(note)
        return decoded.dataset()

    def open_streamed(self, index: FolderIndex) -> Dataset:
        """Opens the folder for decoding on demand."""
        options, shape, bit_depth = self.options, self.image_shape(index), find_bit_depth(index)
        bits = None if bit_depth is None else bit_depth.significant_bits
        index = complete_index(index, self.lock_path, self._log, max_problems=options.skip_bad_images)
        rows = split_rows(index)
        splits = {
            split: FolderImages(index, own, index.labels[own], shape, bits or 16, options.square, options.num_threads)
            for split, own in rows.items()
        }

        def describe() -> tuple[str, ...]:
            digests = {split: index.picture_sha256[own].numpy() for split, own in rows.items()}
            return self._notes(index, bit_depth, rows, digests)

        streamed = open_streamed(self.name, splits, bits, describe, self._log)
        for note in streamed.notes:
            self.log(note)
        return streamed

    def _decode(self) -> DatasetContent:
        """Decodes all images; called under the lock."""
        if self.listing is None:
            index = self.find_index()
        else:
            index = open_or_make_index_locked(self.listing, self.cache, self._log)
        shape, bit_depth = self.image_shape(index), find_bit_depth(index)
        bits = None if bit_depth is None else bit_depth.significant_bits
        problems = dict(index.problems) if index.is_complete else None
        images = decode_pixels(index, shape, bits or 16, self.cache, self._log, square=self.options.square)
        if problems != index.problems:  # else the file stays the one that a streamed training may have locked
            assert index.path is not None
            save_index(index, index.path)
        check_problems(index, self.options.skip_bad_images)
        log_warnings(index, self._log)
        rows = split_rows(index)
        sets = {name: ImageSet(select_images(images, own, self.cache), index.labels[own]) for name, own in rows.items()}
        del images
        digests = {
            name: np.frombuffer(b"".join(image_digests(own.images)), np.uint8).reshape(-1, 32)
            for name, own in sets.items()
        }
        for older in self.cache.glob(f"{self.size_name}-*.pt"):
            discard(older)
        return DatasetContent(
            self.name,
            index.classes,
            sets["train"],
            sets["test"],
            sets.get("validation"),
            self._notes(index, bit_depth, rows, digests),
            significant_bits=bits,
            num_skipped=len(index.problems),
        )

    def _notes(
        self,
        index: FolderIndex,
        bit_depth: BitDepth | None,
        rows: dict[str, torch.Tensor],
        digests: dict[str, Digests],
    ) -> tuple[str, ...]:
        """Returns the lines that every user of the data set should read."""
        notes = [*index.notes, *_describe_bit_depth(bit_depth)]
        if index.problems:
            problems = [index.problem(row) for row in sorted(index.problems)]
            notes.append(
                f"{len(problems)} of {len(index)} images cannot be read and are left out: {list_some(problems)}"
            )
        if not has_test_folder(index):
            notes.append(
                f"no test folder: {len(rows['test'])} of {len(index)} images are held out as test set, by their content"
            )
        labels = {name: index.labels[own] for name, own in rows.items()}
        duplicates = describe_duplicates(digests, labels, lambda name, number: index.file(int(rows[name][number])))
        notes += [f"warning: {line}" for line in duplicates]
        return tuple(_prefixed(self.name, note) for note in notes)


def _listing_key(path: Path) -> str:
    """Returns the key of a listing from the name of its index, or of a file that was decoded by it."""
    return next(part for part in reversed(path.stem.split("-")) if part != _SKIPPING)


def _prefixed(name: str, line: str) -> str:
    """Returns one line with the name of the data set before it, but after `warning: `."""
    text = line.removeprefix("warning: ")
    return printable(f"{'warning: ' if text != line else ''}{name}: {text}")


def _describe_bit_depth(bit_depth: BitDepth | None) -> Iterator[str]:
    if bit_depth is None:
        return
    bits, number = bit_depth.significant_bits, bit_depth.num_images
    if bits < 16:
        yield f"{number} training images have 16 bits and use {bits} of them: {2**bits - 1} is white"
    if bit_depth.num_dark > number / 2:
        yield (
            f"warning: {bit_depth.num_dark} of {number} 16-bit images are nearly black: they use less than a "
            f"sixteenth of the {bits} bits of the brightest one; convert them to 8 bits to use their contrast"
        )


def _check_memory(num_images: int, shape: tuple[int, int, int]) -> None:
    required, available = num_images * math.prod(shape), available_memory()
    if required > available:  # otherwise the kernel would grant the memory now and kill the process later
        images = f"{num_images} images" if num_images > 1 else "an image"
        raise ConfigError(
            f"{images} of {shape[1]}x{shape[2]} take{'' if num_images > 1 else 's'} {required / 1e9:.1f} GB to decode "
            f"and this machine, or its container, has {available / 1e9:.1f} GB: give a smaller --image-size"
            f"{' or --source streamed' if num_images > 1 else ''}"
        )
