"""Decodes a part of an image file to a square of pixels: plain JPEG files fast, all others as `convoy.images` does.

A JPEG file is decoded at the smallest scale of its discrete cosine transform that still covers the crop, which for a
photograph of 12 million pixels takes a fraction of the time. docs/decisions has the comparison of the decoders.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F

from convoy.images import (
    Box,
    Pixels,
    explain_decode_errors,
    pad_image,
    read_image,
    resize_image,
    upright_and_opaque,
    use_image,
)
from trainer.recipes.augmentation import Square

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_PIXELS = 1 << 26
"""Larger images are left to Pillow, which refuses those of twice its own limit."""


class _Turn(NamedTuple):
    """The steps, in this order, from a file's pixels to the image that a viewer shows."""

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False


_TURNS = {
    1: _Turn(),
    2: _Turn(mirrored=True),
    3: _Turn(mirrored=True, flipped=True),
    4: _Turn(flipped=True),
    5: _Turn(transposed=True),
    6: _Turn(transposed=True, mirrored=True),
    7: _Turn(transposed=True, mirrored=True, flipped=True),
    8: _Turn(transposed=True, flipped=True),
}
"""The turn for each value of the EXIF orientation."""


def decode_crop(  # noqa: PLR0913 (how images are decoded)
    path: Path,
    box: Box | None,
    size: int,
    num_channels: int,
    significant_bits: int = 16,
    *,
    square: Square = "crop",
    data: bytes | None = None,
) -> Pixels:
    """Decodes a part of an image and resizes it to a square.

    Args:
        path: the file; its content decides its format, whatever its extension.
        box: the part, of any shape; None for the image as evaluation and serving prepare it, to the bit. With the
            square `pad`, it is a part of the padded square.
        size: width and height of the result.
        num_channels: 1 for grey or 3 for RGB.
        significant_bits: of a 16-bit grey image; the largest value that they hold becomes white.
        square: how a whole image becomes a square.
        data: the content of the file, if it has been read.

    Returns:
        Pixels, uint8 `[C, size, size]`.

    Raises:
        ImageError: the file cannot be opened or decoded.
    """
    shape = num_channels, size, size

    def crop(image: "Image", box: Box) -> Pixels:
        upright = upright_and_opaque(image)
        top, left, bottom, right = _rectangle(box, upright.height, upright.width)
        return resize_image(upright.crop((left, top, right, bottom)), shape, significant_bits=significant_bits)

    def pad(image: "Image") -> Pixels:
        part = (0, 0, 1, 1) if box is None else box
        return pad_image(upright_and_opaque(image), shape, significant_bits=significant_bits, box=part)

    if square == "pad":
        return use_image(path, pad)
    if box is None:
        return read_image(path, shape, significant_bits=significant_bits)
    if data is None:
        with explain_decode_errors(path):
            data = path.read_bytes()
    pixels = _crop_jpeg(data, box, size, num_channels)
    return use_image(path, lambda image: crop(image, box)) if pixels is None else pixels


def _crop_jpeg(data: bytes, box: Box, size: int, num_channels: int) -> Pixels | None:
    """Decodes a plain JPEG file as `decode_crop` does. Returns None if it is another file, or may be damaged."""
    turn = _turn_of_jpeg(data)
    if turn is None:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "Gray") or height * width > _MAX_PIXELS:
            return None
        frame = simplejpeg.decode_jpeg(
            data, "GRAY" if num_channels == 1 else "RGB", **_scale(box, size, height, width, turn)
        )
    except ValueError:
        return None
    height, width = frame.shape[:2]
    if turn.transposed:
        height, width = width, height
    top, left, bottom, right = _rectangle(box, height, width)
    if turn.mirrored:
        left, right = width - right, width - left
    if turn.flipped:
        top, bottom = height - bottom, height - top
    if turn.transposed:
        top, left, bottom, right = left, top, right, bottom
    return _turned(_resized(frame[top:bottom, left:right], size), turn)


def _scale(box: Box, size: int, height: int, width: int, turn: _Turn) -> dict[str, float]:
    """Returns simplejpeg's arguments for the smallest scale at which the box has `size` pixels in both directions.

    Scales between a half and 1 take longer than the whole image.
    """
    _, _, part_height, part_width = box
    if turn.transposed:
        part_height, part_width = part_width, part_height
    min_height, min_width = math.ceil(size / part_height), math.ceil(size / part_width)
    if 2 * min_height > height or 2 * min_width > width:
        return {}
    return {"min_height": min_height, "min_width": min_width, "min_factor": 2}


def _rectangle(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns top, left, bottom and right of a box in pixels; at least one pixel."""
    top, left = min(round(box[0] * height), height - 1), min(round(box[1] * width), width - 1)
    bottom, right = round((box[0] + box[2]) * height), round((box[1] + box[3]) * width)
    return top, left, min(max(bottom, top + 1), height), min(max(right, left + 1), width)


def _resized(pixels: Pixels, size: int) -> Pixels:
    """Resizes with antialiasing. torch does it in a quarter of Pillow's time; the results differ by 1 of 255 at most.

    Args:
        pixels: uint8 `[H, W, C]`.

    Returns:
        uint8 `[C, size, size]`.
    """
    height, width, num_channels = pixels.shape
    part = np.ascontiguousarray(pixels).reshape(1, height, width, num_channels).transpose(0, 3, 1, 2)
    resized: Pixels = F.interpolate(torch.from_numpy(part), (size, size), mode="bilinear", antialias=True).numpy()[0]
    return resized


def _turned(pixels: Pixels, turn: _Turn) -> Pixels:
    """Turns an image, `[C, H, W]`."""
    if turn.transposed:
        pixels = pixels.transpose(0, 2, 1)
    if turn.mirrored:
        pixels = pixels[:, :, ::-1]
    return pixels[:, ::-1] if turn.flipped else pixels


def _turn_of_jpeg(data: bytes) -> _Turn | None:
    """Returns how the metadata of a JPEG file turn it. None if it is another file, or if that is not certain."""
    turn = _TURNS[1]
    found = False
    try:
        for payload in _application_data(data):
            if payload.startswith(b"Exif\0\0"):
                if found:  # Pillow joins them
                    return None
                found, turn = True, _TURNS.get(_exif_orientation(payload[6:]), _TURNS[1])
            elif b"rientation" in payload[:65536] and payload.startswith(b"http://ns.adobe.com/xap/"):
                return None
    except (ValueError, struct.error, IndexError):
        return None
    return turn


def _application_data(data: bytes) -> Iterator[bytes]:
    """Yields the content of each APP1 segment before the image itself.

    Raises:
        ValueError: the file is no JPEG file.
        struct.error: it is cut short.
    """
    if not data.startswith(b"\xff\xd8"):
        raise ValueError("no start of an image")
    at = 2
    while True:
        mark, kind, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF:
            raise ValueError("no marker")
        if kind == 0xFF:  # fill bytes
            at += 1
            continue
        if kind == 0xDA:  # the image begins
            return
        if kind == 0xE1:
            yield data[at + 4 : at + 2 + length]
        at += 2 + length


def _exif_orientation(data: bytes) -> int:
    """Returns the orientation in the first directory of EXIF data, which are a TIFF file; 1 if there is none.

    Raises:
        struct.error: they are cut short.
        ValueError: they are damaged.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise ValueError("no TIFF header")
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (number,) = struct.unpack_from(f"{order}H", data, at)
    for entry in range(number):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", data, at + 2 + 12 * entry)
        if tag == 0x0112:
            if (kind, count) != (3, 1):
                raise ValueError("an orientation of another type")
            return int(value)
    return 1
