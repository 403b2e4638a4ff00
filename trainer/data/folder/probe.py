"""Reads the headers of image files: channels, sizes and bit depth; and finds the bits that 16-bit files use."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convoy.images import BIT_DEPTHS, has_sixteen_bits, is_grey_of_sixteen_bits, upright_and_opaque, use_image
from trainer.data.folder.index import GREY, PROBED, SIXTEEN_BITS, SPLITS, UPPER_BITS, FolderIndex
from trainer.data.folder.workers import ImageProblem, collect_warnings, map_in_threads
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}


def read_headers(index: FolderIndex) -> None:
    """Reads the header of each file that the index does not know yet; of an image of 16 bits also the pixels.

    Files that cannot be read are left for `decode.examine_files` to report.
    """
    rows = np.flatnonzero(~index.has(PROBED)).tolist()
    with collect_warnings():  # decoding reports them
        results = map_in_threads(lambda _, path: use_image(path, _probe), map(index.file, rows))
        for row, result in zip(rows, results, strict=True):
            if not isinstance(result, ImageProblem):
                flags, (width, height), largest = result
                index.flags.numpy()[row] = flags
                index.extents.numpy()[row] = height, width
                index.largest.numpy()[row] = largest


def common_side(index: FolderIndex) -> int:
    """Returns the width of the images, which must be squares of one size.

    Raises:
        ConfigError: they are not.
    """
    extents = np.unique(index.extents.numpy()[index.has(PROBED)], axis=0)
    if len(extents) == 0:
        return 1
    height, width = extents[0].tolist()
    if len(extents) > 1 or width != height:
        extent = f"{width}x{height}" if len(extents) == 1 else f"of {len(extents)} sizes"
        raise ConfigError(f"the images are {extent}, not one square size: give --image-size")
    return int(width)


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


def find_bit_depth(index: FolderIndex) -> BitDepth | None:
    """Finds out how many bits of 16-bit files hold values: cameras and scanners of 10 or 12 bits write such files.

    Returns:
        The bit depth of the training images, or else of the other images; None if no image has 16 bits.

    Raises:
        DataError: colour images use fewer than 16 bits. Pillow has only the upper 8 of them.
    """
    has_sixteen = index.has(SIXTEEN_BITS)
    of_training = has_sixteen & (index.splits.numpy() == SPLITS.index("train"))
    rows = np.flatnonzero(of_training if of_training.any() else has_sixteen)
    if len(rows) == 0:
        return None
    values = index.largest.numpy()[rows]
    bits = next(bits for bits in BIT_DEPTHS if int(values.max()) < 1 << bits)
    coloured = rows[index.has(UPPER_BITS)[rows]].tolist()
    if bits < 16 and coloured:
        raise DataError(
            f"{len(coloured)} colour images, such as {index.file(coloured[0])}, have 16 bits in each channel and use "
            f"the lower {bits} of them; only the upper 8 can be read: convert the images to 8 bits"
        )
    return BitDepth(bits, len(rows), int((values < 1 << (bits - 4)).sum()))


def _probe(image: "Image") -> tuple[int, tuple[int, int], int]:
    """Returns an image's flags, its width and height before EXIF turns it, and its largest value if it has 16 bits.

    A turn leaves a square as it is.
    """
    flags, size, largest = PROBED | (GREY if _is_grey(image) else 0), image.size, 0
    if has_sixteen_bits(image):
        largest, is_grey = _largest_value(image)
        flags |= SIXTEEN_BITS | (0 if is_grey else UPPER_BITS)
    return flags, size, largest


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
