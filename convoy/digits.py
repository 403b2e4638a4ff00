"""Prepares handwritten digits as MNIST was made: light on dark, fitted into 20 x 20, centred by mass in 28 x 28.

The source of the rule is MNIST's own page (http://yann.lecun.com/exdb/mnist/). A digit may be dark on light or light on
dark, of any size, at any place, grey or coloured.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from convoy.images import Pixels, fit_image, upright_and_opaque

if TYPE_CHECKING:
    from PIL.Image import Image

_BOX = 20 / 28
"""Longer side of a digit, as a part of the image."""
_MAX_SIDE = 512
"""Of a larger image, of which a smaller copy is made first: the digit becomes 20 pixels high in the end."""
_MIN_CONTRAST = 32
"""Between ground and ink, of 255. An image with less has no digit."""
_PAPER, _INK = 0.15, 0.75
"""Parts of the ink's strength below which a pixel counts as paper, and above which it counts as full ink."""

Grey = npt.NDArray[np.float32]


def is_inverted(pixels: npt.NDArray[np.uint8]) -> bool:
    """Returns whether a grey image shows something dark on a light background.

    The background is the median of the outermost pixels. It is light if it is nearer to the lightest pixels than to the
    darkest (the 99th and the 1st percentile: a speck decides nothing, and a photograph of paper in the shade still
    counts as light). An image with next to no contrast has no background.

    Args:
        pixels: uint8 [H, W].
    """
    darkest, lightest = np.percentile(pixels, (1, 99))
    if lightest - darkest < _MIN_CONTRAST:
        return False
    return bool(_ground(pixels) > (int(darkest) + int(lightest)) / 2)


def prepare_digit(image: "Image", shape: tuple[int, int, int], *, significant_bits: int = 16) -> Pixels:
    """Prepares an opened image of a digit.

    An image of the model's own size that is light on dark is taken as it is, so that MNIST's own images stay the same.
    One without contrast is prepared as any other image.

    Args:
        image: a Pillow image of any mode and size.
        shape, significant_bits: as of `convoy.images.fit_image`; the channels of RGB are the same.

    Returns:
        Pixels, uint8 [C, H, W], light on dark.

    Raises:
        ValueError: the pixels are floating-point numbers, or integers outside of 0 to 65535.
    """
    channels, height, width = shape
    image = upright_and_opaque(image)
    grey = fit_image(image, (1, image.height, image.width), significant_bits=significant_bits)[0]
    is_prepared = grey.shape == (height, width) and not is_inverted(grey)
    ink = None if is_prepared else _ink(_reduced(grey))
    if ink is None:
        return fit_image(image, shape, significant_bits=significant_bits)
    placed = _centred(_fitted(_cropped(ink), round(_BOX * min(height, width))), height, width)
    return np.repeat(placed[None], channels, axis=0)


def _ground(pixels: npt.NDArray[np.uint8]) -> float:
    """Returns the median of the outermost pixels."""
    return float(np.median(np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])))


def _reduced(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Returns the image, at most `_MAX_SIDE` pixels high and wide."""
    from PIL import Image

    factor = -(-max(grey.shape) // _MAX_SIDE)
    return grey if factor == 1 else np.asarray(Image.fromarray(grey).reduce(factor))


def _ink(grey: npt.NDArray[np.uint8]) -> Grey | None:
    """Returns the strength of the ink at each pixel, from 0 to 1; None for an image without contrast.

    Ink is what differs most from the ground, be it darker or lighter. A digit may be a hundredth of its sheet.
    """
    ground = _ground(grey)
    darkest, lightest = int(grey.min()), int(grey.max())
    if max(ground - darkest, lightest - ground) < _MIN_CONTRAST:
        return None
    is_dark = ground - darkest > lightest - ground
    strength = (ground - grey if is_dark else grey - ground).astype(np.float32)
    full = float(np.median(strength[strength > strength.max() / 2]))
    ink: Grey = np.clip((strength / full - _PAPER) / (_INK - _PAPER), 0, 1)
    return ink


def _cropped(ink: Grey) -> Grey:
    """Returns the box of the ink."""
    rows, columns = np.flatnonzero(ink.max(axis=1) > 0.5), np.flatnonzero(ink.max(axis=0) > 0.5)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _fitted(ink: Grey, side: int) -> Grey:
    """Resizes the ink so that its longer side has `side` pixels, and its darkest pixel is full ink."""
    from PIL import Image

    scale = side / max(ink.shape)
    size = max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale))
    small: Grey = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BILINEAR), np.float32)
    full: Grey = small / max(small.max(), np.float32(1e-3))
    return full


def _centred(ink: Grey, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Places the ink so that its centre of mass is in the middle, as far as all of it stays inside."""
    down, across = (_offset(mass, size) for mass, size in ((ink.sum(axis=1), height), (ink.sum(axis=0), width)))
    placed = np.zeros((height, width), np.uint8)
    placed[down : down + ink.shape[0], across : across + ink.shape[1]] = np.rint(255 * ink)
    return placed


def _offset(mass: Grey, size: int) -> int:
    """Returns where a digit begins, given the mass of each of its rows or columns."""
    center = float((mass * np.arange(len(mass))).sum() / mass.sum())
    return min(max(round((size - 1) / 2 - center), 0), size - len(mass))
