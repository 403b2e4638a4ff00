"""Reads and prepares images: one preprocessing for training, evaluation and the client of the server.

`prepare_image` applies the EXIF orientation, keeps the upper 8 of 16 bits, composites transparency on white, converts
to grey or RGB, resizes the shorter side with antialiasing and crops the centre. Of an animation it takes the first
frame. Pillow is imported by the first call, so that a command that reads no image starts without it.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels: TypeAlias = npt.NDArray[np.uint8]

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""File name extensions, in lower case, that mark an image in a folder."""

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on bad bytes, besides DecompressionBombError."""


class ImageError(ValueError):
    """An image cannot be opened or decoded; the message gives the reason in one line, without the path."""


def read_image(path: Path, shape: tuple[int, int, int]) -> Pixels:
    """Decodes and prepares an image file.

    Args:
        path: the file; its content decides its format, whatever its extension.
        shape: (C, H, W) of the result; C is 1 for grey or 3 for RGB.

    Returns:
        Pixels, uint8 [C, H, W].

    Raises:
        ImageError: the file cannot be opened or decoded.
    """
    from PIL import Image

    with explain_decode_errors(path), Image.open(path) as image:
        return prepare_image(image, shape)


def prepare_image(image: "Image", shape: tuple[int, int, int]) -> Pixels:
    """Prepares an opened image.

    Args:
        image: a Pillow image of any mode and size.
        shape: (C, H, W) of the result; C is 1 for grey or 3 for RGB.

    Returns:
        Pixels, uint8 [C, H, W].

    Raises:
        ValueError: the pixels are floating-point numbers.
    """
    from PIL import Image, ImageOps

    num_channels, height, width = shape
    image = _on_white(_to_eight_bits(ImageOps.exif_transpose(image))).convert("L" if num_channels == 1 else "RGB")
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[None] if num_channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def explain_decode_errors(path: Path) -> Iterator[None]:
    """Raises ImageError in place of whatever Pillow raises for the file at `path`."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ImageError(f"it has more than {limit:.0f} million pixels: scale it down") from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).replace(str(path), "it").split())
        raise ImageError(reason or type(error).__name__) from error


def _to_eight_bits(image: "Image") -> "Image":
    """Keeps the upper byte of 16-bit grey pixels, which Pillow's own conversion would clip at 255."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def _on_white(image: "Image") -> "Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white
