"""Decodes image files of any format and size into one uint8 tensor.

`convoy.images` prepares each image.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from convoy.cpus import available_memory
from convoy.images import fit_image, is_grey_of_sixteen_bits, upright_and_opaque, use_image
from trainer.data.folder.workers import ImageProblem, collect_warnings, list_some, map_in_threads
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_COPIES = 2
"""The images are in memory once as they are decoded and once more as they are written."""
_BYTES_PER_PIXEL = 12
"""Of an image that is decoded: Pillow has 4 bytes for a pixel, and a turn or transparency makes copies."""


@dataclass(frozen=True, slots=True)
class DecodedImages:
    """Images in the order of their files.

    Args:
        images: uint8 [N, C, size, size].
        digests: `picture_digest` of each image.
        warnings: of Pillow and of `convoy.images`.
    """

    images: torch.Tensor
    digests: list[str]
    warnings: list[ImageProblem]


def decode_images(
    paths: Sequence[Path],
    num_channels: int,
    size: int,
    log: Callable[[str], None],
    *,
    significant_bits: int = 16,
    max_pixels: int = 1,
) -> DecodedImages:
    """Decodes and prepares images. Logs the progress.

    Args:
        paths: image files.
        num_channels: 1 for grey or 3 for RGB.
        size: width and height of the result, in pixels.
        log: receives each line for the user.
        significant_bits: of 16-bit grey images.
        max_pixels: number of pixels of the largest file, which limits the number of threads.

    Raises:
        ConfigError: the images do not fit in memory.
        DataError: images cannot be read; the message counts them and names the first.
    """
    shape = (len(paths), num_channels, size, size)
    required, available = _COPIES * math.prod(shape), available_memory()
    images = _allocate(shape, required, available)
    target = images.numpy()

    def decode(image: "Image", index: int) -> str:
        upright = upright_and_opaque(image)
        target[index] = fit_image(upright, shape[1:], significant_bits=significant_bits)
        return picture_digest(upright)

    max_threads = (available - required) // (_BYTES_PER_PIXEL * max_pixels)
    log_every = max(100, len(paths) // 10)  # a small folder is decoded too soon for a line
    digests: list[str] = []
    unreadable: list[ImageProblem] = []
    with collect_warnings() as warned:
        results = map_in_threads(
            lambda index, path: use_image(path, lambda image: decode(image, index)), paths, max_threads
        )
        for num_done, result in enumerate(results, start=1):
            if isinstance(result, ImageProblem):
                unreadable.append(result)
            else:
                digests.append(result)
            if num_done % log_every == 0:
                log(f"decoded {num_done} of {len(paths)} images")
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(paths)} images cannot be read: {list_some(unreadable)}")
    return DecodedImages(images, digests, list(warned.values()))


def _allocate(shape: tuple[int, ...], required: int, available: int) -> torch.Tensor:
    try:
        if required <= available:  # otherwise the kernel would grant the memory now and kill the process later
            return torch.empty(shape, dtype=torch.uint8)
    except RuntimeError:  # torch's error for memory that the kernel does not grant
        pass
    raise ConfigError(
        f"{shape[0]} images of {shape[2]}x{shape[3]} take {required / 1e9:.1f} GB to decode and this machine, or its "
        f"container, has {available / 1e9:.1f} GB: give a smaller --image-size"
    )


def picture_digest(image: "Image") -> str:
    """Returns the SHA-256, in hex, of the pixels of an image as it was before it was resized.

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
    return digest.hexdigest()
