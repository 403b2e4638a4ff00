"""Reads and prepares images: one preprocessing for training, evaluation and the client of the server.

`prepare_image` applies the EXIF orientation, composites transparency on white, scales 16-bit values to 8 bits, converts
to grey or RGB, resizes the shorter side with antialiasing and crops the centre. Of an animation it takes the first
frame. Pillow is imported by the first call, so that a command that reads no image starts without it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from convoy.metadata import without_metadata
from convoy.named_files import read_file

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

Pixels: TypeAlias = npt.NDArray[np.uint8]
Box: TypeAlias = tuple[float, float, float, float]
"""Top, left, height and width, as fractions of the height and width of the image that a viewer shows."""
Result = TypeVar("Result")

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""File name extensions, in lower case, that mark an image in a folder."""

BIT_DEPTHS = (8, 10, 12, 14, 16)
"""Numbers of significant bits that 16-bit files are known to hold: a camera or a scanner may use fewer than 16."""

SIGNIFICANT_BITS = "significant_bits"
"""The parameter of a served model's configuration that tells clients how 16-bit files were scaled in training."""

_MAX_UNCROPPED_PIXELS = 1 << 22
_MAX_UNCROPPED_RATIO = 16
_MAX_RETRIED_BYTES = 1 << 28
_MIN_READS = 10_000
_BYTES_PER_READ = 256
"""How often the content of a file may be read: `_MIN_READS`, and once for so many bytes. 10,000 reads take 7 ms; a PNG
file takes three for each chunk, of which most have 8 kB."""


class ImageError(ValueError):
    """An image cannot be opened or decoded; the message gives the reason in one line, without the path."""


class UnknownFormatError(ImageError):
    """A file is no image, or one of a format that is not read."""


def read_image(path: Path, shape: tuple[int, int, int], *, significant_bits: int = 16) -> Pixels:
    """Decodes and prepares an image file.

    Args:
        path: the file; its content decides its format, whatever its extension.
        shape, significant_bits: as of `fit_image`.

    Returns:
        Pixels, uint8 [C, H, W].

    Raises:
        ImageError: the file cannot be opened or decoded.
    """
    return use_image(path, lambda image: prepare_image(image, shape, significant_bits=significant_bits))


def use_image(
    source: Path | bytes, use: Callable[["Image"], Result], *, formats: tuple[str, ...] | None = None
) -> Result:
    """Opens an image file and calls `use`. Where that fails, tries again without the file's metadata, and warns.

    Args:
        source: a path, or the content of a file.
        use: gets the opened image, of which only the header has been read.
        formats: Pillow's names of the formats to accept; None for all.

    Returns:
        What `use` returns.

    Raises:
        ImageError: the file cannot be opened, or `use` fails.
    """
    with explain_decode_errors(None if isinstance(source, bytes) else source):
        if isinstance(source, Path) and not source.is_file():
            source = read_file(source)
        try:
            return _use(source, use, formats)
        except ImageError:
            raise
        except Exception as error:
            try:
                result = _use(without_metadata(_content(source)) or b"", use, formats)
            except Exception:
                raise error from None
            warnings.warn("its metadata are damaged and not used", stacklevel=2)
            return result


def _use(source: Path | bytes, use: Callable[["Image"], Result], formats: tuple[str, ...] | None) -> Result:
    from PIL import Image

    with Image.open(_Content(source) if isinstance(source, bytes) else source, formats=formats) as image:
        if image.format == "EPS":  # Pillow would have Ghostscript run it
            raise ImageError("it is a program in PostScript: convert it to PNG")
        return use(image)


class _Content(BytesIO):
    """The content of a file, whose parts Pillow reads one by one: a file may consist of millions of empty ones."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._num_reads_left = _MIN_READS + len(content) // _BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        self._num_reads_left -= 1
        if self._num_reads_left < 0:
            raise ImageError("it consists of too many parts: save it again")
        return super().read(size)


def _content(source: Path | bytes) -> bytes:
    """Returns the content of a file; nothing of one that is too large to read."""
    if isinstance(source, bytes):
        return source
    return source.read_bytes() if source.stat().st_size <= _MAX_RETRIED_BYTES else b""


def prepare_image(image: "Image", shape: tuple[int, int, int], *, significant_bits: int = 16) -> Pixels:
    """Prepares an opened image, of any mode and size. Arguments and result as of `fit_image`.

    Raises:
        ValueError: the pixels are floating-point numbers, or integers outside of 0 to 65535.
    """
    return fit_image(upright_and_opaque(image), shape, significant_bits=significant_bits)


def upright_and_opaque(image: "Image") -> "Image":
    """Applies the EXIF orientation and composites transparency on white.

    Args:
        image: a Pillow image of any mode and size.

    Returns:
        An image of the same size or turned, without transparency; grey with 16 bits stays so.

    Raises:
        ValueError: the pixels are floating-point numbers, or integers outside of 0 to 65535.
    """
    image.load()
    method = _transposition(image)
    if method is not None:
        image = image.transpose(method)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if is_grey_of_sixteen_bits(image):
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]  # of an image with one band
            raise ValueError(f"its values, {low} to {high}, are not within 0 to 65535: convert it to 8 or 16 bits")
        return image
    return _on_white(image)


def fit_image(image: "Image", shape: tuple[int, int, int], *, significant_bits: int = 16) -> Pixels:
    """Converts what `upright_and_opaque` returns to 8 bits and the channels of `shape`, resizes and crops it.

    Args:
        image: an image without transparency.
        shape: (C, H, W) of the result; C is 1 for grey or 3 for RGB.
        significant_bits: of a 16-bit grey image; the largest value that they hold becomes white.

    Returns:
        Pixels, uint8 [C, H, W].
    """
    num_channels, height, width = shape
    image = _with_channels(image, num_channels, significant_bits)
    if image.size != (width, height):
        image = _resize_and_crop(image, width, height)
    return _pixels_of(image)


def pad_image(
    image: "Image", shape: tuple[int, int, int], *, significant_bits: int = 16, box: Box = (0, 0, 1, 1)
) -> Pixels:
    """Puts what `upright_and_opaque` returns in the middle of a white square, and resizes that to `shape`.

    Args:
        image, shape, significant_bits: as of `fit_image`.
        box: the part of the square to show.

    Returns:
        Pixels, uint8 [C, H, W].
    """
    from PIL import Image

    num_channels, height, width = shape
    image = _with_channels(image, num_channels, significant_bits)
    side = max(image.size)
    left, right, x0, x1 = _overlap(image.width, side, box[1], box[1] + box[3], width)
    top, bottom, y0, y1 = _overlap(image.height, side, box[0], box[0] + box[2], height)
    padded = Image.new(image.mode, (width, height), "white")
    if x1 > x0 and y1 > y0:
        source = left, top, right, bottom
        padded.paste(image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=source), (x0, y0))
    return _pixels_of(padded)


def resize_image(image: "Image", shape: tuple[int, int, int], *, significant_bits: int = 16) -> Pixels:
    """Does the same as `fit_image`, but resizes without regard to the image's shape."""
    from PIL import Image

    num_channels, height, width = shape
    image = _with_channels(image, num_channels, significant_bits)
    return _pixels_of(image.resize((width, height), Image.Resampling.BILINEAR))


def is_grey_of_sixteen_bits(image: "Image") -> bool:
    """Returns whether an image is grey with more than 8 bits; Pillow reads all of them."""
    return image.mode.startswith("I")


def has_sixteen_bits(image: "Image") -> bool:
    """Returns whether an opened file, before loading, has 16 bits in each channel, grey or colour.

    Pillow reads all of them for grey images, and the upper 8 for colour images.
    """
    return is_grey_of_sixteen_bits(image) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))


@contextmanager
def explain_decode_errors(path: Path | None = None) -> Iterator[None]:
    """Raises ImageError in place of any exception about an image: decoders raise exceptions of every kind.

    Args:
        path: the file, whose path the message leaves out; None for an image that comes from no file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        raise UnknownFormatError("it is no image, or damaged at its beginning") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ImageError(f"it has more than {limit:.0f} million pixels: scale it down") from error
    except MemoryError as error:
        raise ImageError("it does not fit in memory: scale it down") from error
    except Exception as error:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = " ".join((text if path is None else text.replace(str(path), "it")).split())
        raise ImageError(reason or type(error).__name__) from error


def _transposition(image: "Image") -> "Transpose | None":
    """Returns how the EXIF orientation turns the image. Pillow's `exif_transpose` fails on damaged EXIF data."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except Exception as error:
        warnings.warn(f"its EXIF data are damaged, and not used to turn it: {error}", stacklevel=2)
        return None
    methods: dict[object, Transpose] = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return methods.get(orientation)


def _to_eight_bits(image: "Image", significant_bits: int) -> "Image":
    """Keeps the upper 8 of the significant bits of 16-bit grey pixels; Pillow's own conversion would clip at 255."""
    from PIL import Image

    if not is_grey_of_sixteen_bits(image):
        return image
    values = np.asarray(image).clip(0, (1 << significant_bits) - 1)
    return Image.fromarray((values >> (significant_bits - 8)).astype(np.uint8))


def _with_channels(image: "Image", num_channels: int, significant_bits: int) -> "Image":
    return _with_mode(_to_eight_bits(image, significant_bits), "L" if num_channels == 1 else "RGB")


def _overlap(length: int, side: int, start: float, end: float, size: int) -> tuple[float, float, int, int]:
    """Returns, for one axis, which part of an image a part of its square shows, and the pixels that it fills.

    Args:
        length: of the image, in pixels.
        side: of the square, whose middle is the image's.
        start: of the part of the square, as a fraction of it.
        end: likewise.
        size: pixels of the result.

    Returns:
        Start and end in the image, start and end in the result. At least one pixel of the result is filled, unless the
        part has nothing of the image.
    """
    before = (side - length) / 2
    first, last = max(start * side - before, 0.0), min(end * side - before, float(length))
    if first >= last:
        return 0.0, 0.0, 0, 0
    scale = size / ((end - start) * side)
    begin = min(max(round((first + before - start * side) * scale), 0), size - 1)
    return first, last, begin, min(max(round((last + before - start * side) * scale), begin + 1), size)


def _pixels_of(image: "Image") -> Pixels:
    """Returns the pixels of an image with 8 bits, [C, H, W]."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _on_white(image: "Image") -> "Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(_with_mode(image, "RGBA"))
    return white


def _with_mode(image: "Image", mode: str) -> "Image":
    """Converts the image; unlike Pillow's `convert`, makes no copy of one that has the mode."""
    return image if image.mode == mode else image.convert(mode)


def _resize_and_crop(image: "Image", width: int, height: int) -> "Image":
    """Resizes the shorter side and crops the centre.

    A strip of 1 x 20,000 pixels would be resized to 224 x 4,480,000 pixels, which are 4 GB. So of a long strip only the
    centre is resized. This is not done for other images: Pillow takes the box in 32-bit floating-point numbers, which
    changes about half of all images in single pixels, by 1 of 255.
    """
    from PIL import Image

    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    box = left, top, left + width, top + height
    if size[0] * size[1] <= max(_MAX_UNCROPPED_PIXELS, _MAX_UNCROPPED_RATIO * width * height):
        return image.resize(size, Image.Resampling.BILINEAR).crop(box)
    across, down = image.width / size[0], image.height / size[1]
    source = box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=source)
