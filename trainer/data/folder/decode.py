"""Decodes each file of a folder once: for its digests, and for a resident set also for its pixels.

`convoy.images` prepares each image.
"""

import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from convoy.cpus import available_memory
from convoy.images import (
    explain_decode_errors,
    fit_image,
    is_grey_of_sixteen_bits,
    pad_image,
    upright_and_opaque,
    use_image,
)
from trainer.data.folder.index import DECODED, FolderIndex
from trainer.data.folder.workers import ImageProblem, collect_warnings, map_in_threads
from trainer.data.staging import explain_disk_errors
from trainer.files import sha256_of_file
from trainer.recipes.augmentation import Square

if TYPE_CHECKING:
    from PIL.Image import Image

_BYTES_PER_PIXEL = 12
"""Of an image that is decoded: Pillow has 4 bytes for a pixel, and a turn or transparency makes copies."""
_LOG_EVERY_S = 30.0
_SAVE_EVERY_S = 60.0
_COPY_BYTES = 1 << 24

T = TypeVar("T")


def examine_files(index: FolderIndex, log: Callable[[str], None], save: Callable[[], None]) -> None:
    """Decodes the files that the index has no digests of, and enters these, or why a file cannot be decoded.

    Args:
        index: its headers are read.
        log: receives lines about the progress.
        save: called every minute, so that a kill does not cost all the work.
    """
    rows, saved_at = np.flatnonzero(~index.has(DECODED)), time.monotonic()
    for _ in _decode(index, rows, lambda _row, _image: None, available_memory(), log):
        if time.monotonic() - saved_at > _SAVE_EVERY_S:
            save()
            saved_at = time.monotonic()


def decode_pixels(
    index: FolderIndex,
    shape: tuple[int, int, int],
    significant_bits: int,
    folder: Path,
    log: Callable[[str], None],
    *,
    square: Square = "crop",
) -> torch.Tensor:
    """Decodes all files, and enters in the index what `examine_files` does.

    Args:
        index: its headers are read.
        shape: (C, H, W) of each image.
        significant_bits: of 16-bit grey images.
        folder: on the disk that holds the pixels while they are not written.
        log: receives lines about the progress.
        square: how images become squares.

    Returns:
        Uint8 [N, C, H, W], mapped from a file without a name; zeros where a file cannot be decoded.

    Raises:
        DataError: the disk is full.
    """
    images = tensor_on_disk((len(index), *shape), folder)
    target = images.numpy()

    to_square = pad_image if square == "pad" else fit_image

    def prepare(row: int, image: "Image") -> None:
        target[row] = to_square(image, shape, significant_bits=significant_bits)

    for _ in _decode(index, np.arange(len(index)), prepare, max(0, available_memory() - images.nbytes), log):
        pass
    return images


def select_images(images: torch.Tensor, rows: torch.Tensor, folder: Path) -> torch.Tensor:
    """Returns some of the images in another tensor on disk."""
    selected = tensor_on_disk((len(rows), *images.shape[1:]), folder)
    size = max(1, _COPY_BYTES // max(1, images[0].numel()))
    for start in range(0, len(rows), size):
        torch.index_select(images, 0, rows[start : start + size], out=selected[start : start + size])
    return selected


def tensor_on_disk(shape: tuple[int, ...], folder: Path) -> torch.Tensor:
    """Returns a uint8 tensor in a file without a name, which the kernel may write to disk where memory is short.

    Raises:
        DataError: the disk is full.
        ConfigError: the folder cannot be written.
    """
    size_bytes = int(np.prod(shape))
    if size_bytes == 0:
        return torch.empty(shape, dtype=torch.uint8)
    with explain_disk_errors(folder, size_bytes), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)  # writing to a mapped page that the disk lacks is fatal
        memory = mmap.mmap(file.fileno(), size_bytes)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def _decode(
    index: FolderIndex,
    rows: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    use: Callable[[int, "Image"], None],
    memory: int,
    log: Callable[[str], None],
) -> Iterator[None]:
    """Decodes files, and yields after each.

    Args:
        rows: positions of the files in the index.
        use: gets the position and the upright image, in a thread.
        memory: bytes for images that are being decoded, which limits the number of threads.
    """
    is_known = index.has(DECODED)

    def decode(row: int, path: Path) -> tuple[int, int, bytes, bytes] | None:
        def digest(image: "Image") -> tuple[int, int, bytes] | None:
            upright = upright_and_opaque(image)
            use(row, upright)
            return None if is_known[row] else (upright.height, upright.width, picture_digest(upright))

        found = use_image(path, digest)
        with explain_decode_errors(path):
            return None if found is None else (*found, bytes.fromhex(sha256_of_file(path)))

    extents = index.extents.numpy().astype(np.int64)
    max_pixels = max(1, int(extents.prod(axis=1).max(initial=1)))
    positions = rows.tolist()
    with collect_warnings() as warned:
        paths = map(index.file, positions)
        results = map_in_threads(
            lambda number, path: decode(positions[number], path), paths, memory // (_BYTES_PER_PIXEL * max_pixels)
        )
        for row, result in zip(positions, _logged(results, len(positions), log), strict=True):
            if isinstance(result, ImageProblem):
                index.problems[row] = result.reason
                index.flags.numpy()[row] &= 255 - DECODED
                warned.pop(result.path, None)
            else:
                index.problems.pop(row, None)
                if result is not None:
                    _enter(index, row, *result)
                if warned and (warning := warned.pop(index.file(row), None)) is not None:
                    index.warnings[row] = warning.reason
            yield


def _enter(index: FolderIndex, row: int, height: int, width: int, picture: bytes, file: bytes) -> None:
    index.extents.numpy()[row] = height, width
    index.picture_sha256.numpy()[row] = np.frombuffer(picture, np.uint8)
    index.file_sha256.numpy()[row] = np.frombuffer(file, np.uint8)
    index.flags.numpy()[row] |= DECODED


def _logged(results: Iterator[T], number: int, log: Callable[[str], None]) -> Iterator[T]:
    """Yields the results, and logs the progress: each tenth, and every half a minute."""
    log_every = max(100, number // 10)  # a small folder is decoded too soon for a line
    began = logged_at = time.monotonic()
    for num_done, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if num_done % log_every == 0 or now - logged_at > _LOG_EVERY_S:
            logged_at = now
            log(f"decoded {num_done:,} of {number:,} images, {num_done / max(now - began, 1e-3):,.0f} a second")


def picture_digest(image: "Image") -> bytes:
    """Returns the SHA-256 of the pixels of an image as it was before it was resized.

    Two files have the same digest if they show the same picture, whatever their format, metadata and orientation.

    Args:
        image: from `upright_and_opaque`.
    """
    image = image if is_grey_of_sixteen_bits(image) or image.mode == "RGB" else image.convert("RGB")
    pixels = np.ascontiguousarray(image)
    if image.mode != "RGB":
        pixels = pixels.astype("<u2")
    digest = hashlib.sha256(f"{pixels.dtype} {pixels.shape}\n".encode())
    digest.update(pixels.data)
    return digest.digest()
