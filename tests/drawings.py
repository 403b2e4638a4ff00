"""Drawings of digits, made by code: a grey pen on white paper, of any size, at any place.

No two are alike: a generator draws the size of the paper, the size, place and slant of the digit, the width of the pen,
and the greys of ink and paper.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

_SCALE = 4
"""By which the drawing is larger than the paper, to smooth its edges."""

Point = tuple[float, float]


def _arc(x: float, y: float, across: float, down: float, begin: float, end: float) -> list[Point]:
    """Returns points on an ellipse, from one angle to another in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(begin, end, 24))
    return [(x + across * float(np.cos(angle)), y + down * float(np.sin(angle))) for angle in angles]


_STROKES: dict[int, list[list[Point]]] = {
    0: [_arc(0.5, 0.5, 0.33, 0.5, -90, 275)],
    1: [[(0.32, 0.2), (0.54, 0.0), (0.5, 1.0)]],
    2: [[*_arc(0.48, 0.28, 0.33, 0.28, -160, 30), (0.55, 0.68), (0.14, 1.0), (0.88, 0.97)]],
    3: [[*_arc(0.45, 0.25, 0.31, 0.25, -150, 85), *_arc(0.45, 0.74, 0.36, 0.26, -90, 150)]],
    4: [[(0.55, 0.0), (0.12, 0.62), (0.9, 0.6)], [(0.66, 0.3), (0.62, 1.0)]],
    5: [[(0.82, 0.02), (0.3, 0.0), (0.22, 0.42), *_arc(0.45, 0.68, 0.36, 0.32, -120, 140)]],
    6: [[(0.66, 0.0), (0.34, 0.3), *_arc(0.47, 0.7, 0.31, 0.3, 190, 540)]],
    7: [[(0.12, 0.04), (0.86, 0.02), (0.6, 0.45), (0.42, 1.0)]],
    8: [[*_arc(0.5, 0.26, 0.26, 0.25, 90, 450), *_arc(0.5, 0.75, 0.31, 0.25, -90, 270)]],
    9: [[*_arc(0.48, 0.3, 0.3, 0.3, 10, -345), (0.76, 0.5), (0.66, 1.0)]],
}
"""Lines of each digit, in a box of 1 x 1 with the origin at the top left."""


def drawings(number: int = 200, seed: int = 0) -> Iterator[tuple[Image.Image, int]]:
    """Yields images in mode L with their digits, each digit equally often."""
    generator = np.random.default_rng(seed)
    for index in range(number):
        yield draw(index % 10, generator), index % 10


def draw(digit: int, generator: np.random.Generator) -> Image.Image:
    """Returns one drawing."""
    width, height = (int(side) for side in generator.integers(64, 400, 2))
    size = generator.uniform(0.35, 0.8) * min(width, height)
    left, top = generator.uniform(0.05, 1) * (width - 1.05 * size), generator.uniform(0.05, 1) * (height - 1.05 * size)
    slant, narrow = generator.uniform(-0.2, 0.15), generator.uniform(0.7, 1)
    pen = generator.uniform(0.07, 0.14) * size
    ink, paper = (int(grey) for grey in (generator.integers(20, 130), generator.integers(225, 256)))
    image = Image.new("L", (_SCALE * width, _SCALE * height), paper)
    canvas = ImageDraw.Draw(image)
    for stroke in _STROKES[digit]:
        wobble = generator.normal(0, 0.008, (len(stroke), 2))
        points = [
            (left + size * (0.5 + narrow * (x + dx - 0.5) - slant * (y - 0.5)), top + size * (y + dy))
            for (x, y), (dx, dy) in zip(stroke, wobble, strict=True)
        ]
        _line(canvas, points, pen, ink)
    noise = generator.normal(0, 3, (height, width))
    smooth = np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def _line(canvas: ImageDraw.ImageDraw, points: Sequence[Point], pen: float, ink: int) -> None:
    """Draws a line with round ends and joints."""
    scaled = [(_SCALE * x, _SCALE * y) for x, y in points]
    canvas.line(scaled, fill=ink, width=max(1, round(_SCALE * pen)), joint="curve")
    radius = _SCALE * pen / 2
    for x, y in (scaled[0], scaled[-1]):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
