"""Reads the headers of image files: channels, sizes and bit depth; and finds the bits that 16-bit files use."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convoy.images import BIT_DEPTHS, has_sixteen_bits, is_grey_of_sixteen_bits, upright_and_opaque, use_image
from trainer.data.folder.workers import ImageProblem, collect_warnings, map_in_threads
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers of image files.

    Args:
        num_channels: 1 if all images are grey, else 3.
        side: width and height of the images before resizing, in pixels; of the narrowest one if they differ.
        max_pixels: number of pixels of the largest image.
        of_sixteen_bits: the files with 16 bits in each channel.
    """

    num_channels: int
    side: int
    max_pixels: int
    of_sixteen_bits: frozenset[Path]


def probe_images(paths: Sequence[Path], *, size_given: bool) -> Headers:
    """Reads the header of every image.

    Images that cannot be opened are left for `decode_images` to report.

    Args:
        paths: image files.
        size_given: the images will be resized. Otherwise they must be squares of one size.

    Raises:
        ConfigError: no size is given, and the images are not squares of one size.
    """
    with collect_warnings():  # decoding reports them
        results = list(map_in_threads(lambda _, path: use_image(path, _probe), paths))
    headers = [
        (path, *result) for path, result in zip(paths, results, strict=True) if not isinstance(result, ImageProblem)
    ]
    sizes = {size for _, _, size, _ in headers} or {(1, 1)}
    width, height = min(sizes)
    if not size_given and (len(sizes) > 1 or width != height):
        extent = f"{width}x{height}" if len(sizes) == 1 else f"of {len(sizes)} sizes"
        raise ConfigError(f"the images are {extent}, not one square size: give --image-size")
    return Headers(
        num_channels=1 if all(grey for _, grey, _, _ in headers) else 3,
        side=width,
        max_pixels=max(width * height for width, height in sizes),
        of_sixteen_bits=frozenset(path for path, _, _, has_sixteen in headers if has_sixteen),
    )


@dataclass(frozen=True, slots=True)
class BitDepth:
    """The bits that 16-bit image files use.

    Args:
        significant_bits: the smallest of `BIT_DEPTHS` that holds all values.
        num_images: number of files.
        num_dark: number of files whose values are all in the lowest sixteenth of that range.
    """

    significant_bits: int
    num_images: int
    num_dark: int


def find_bit_depth(paths: Sequence[Path]) -> BitDepth:
    """Finds out how many bits of 16-bit files hold values: cameras and scanners of 10 or 12 bits write such files.

    Args:
        paths: files with 16 bits in each channel.

    Raises:
        DataError: colour images use fewer than 16 bits. Pillow has only the upper 8 of them.
    """
    results = map_in_threads(lambda _, path: (path, *use_image(path, _largest_value)), paths)
    found = [result for result in results if not isinstance(result, ImageProblem)]  # decoding reports the others
    most = max((value for _, value, _ in found), default=65535)
    bits = next(bits for bits in BIT_DEPTHS if most < 1 << bits)
    coloured = [path for path, _, is_grey in found if not is_grey]
    if bits < 16 and coloured:
        raise DataError(
            f"{len(coloured)} colour images, such as {coloured[0]}, have 16 bits in each channel and use the lower "
            f"{bits} of them; only the upper 8 can be read: convert the images to 8 bits"
        )
    return BitDepth(bits, len(paths), sum(value < 1 << (bits - 4) for _, value, _ in found))


def _probe(image: "Image") -> tuple[bool, tuple[int, int], bool]:
    """Returns whether the image is grey, its size before EXIF turns it, and whether it has 16 bits.

    A turn leaves a square as it is.
    """
    return _is_grey(image), image.size, has_sixteen_bits(image)


def _is_grey(image: "Image") -> bool:
    if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY_MODES


def _largest_value(image: "Image") -> tuple[int, bool]:
    """Returns the largest of an image's values, or what it may be at most, and whether the image is grey."""
    if is_grey_of_sixteen_bits(image):
        return int(np.asarray(upright_and_opaque(image)).max()), True
    upper = np.asarray(image.convert("RGB")).max()
    return (int(upper) << 8) + 255, False
