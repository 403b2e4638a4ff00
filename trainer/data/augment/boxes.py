"""Random rectangles: those that random resized crop keeps, and those that erasing covers."""

import math

import torch

from trainer.data.order import generator
from trainer.recipes.augmentation import Augment

NUM_TRIES = 10
"""Rectangles that are drawn for an image to find one that fits, as in torchvision."""

_CHUNK = 1 << 16


def draw_crops(augment: Augment, sizes: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Draws the part of each image that an epoch shows, as torchvision's `RandomResizedCrop.get_params` does.

    Args:
        augment: without random resized crop, the part is the largest square at the centre.
        sizes: int `[N, 2]`, height and width of each image.

    Returns:
        float32 `[N, 4]`: top, left, height, width as fractions of the image's height and width. With random resized
        crop, times the image's size they are whole numbers of pixels up to rounding.
    """
    if not augment.crops:
        height, width = sizes.float().unbind(1)
        side = torch.minimum(height, width)
        return torch.stack([(1 - side / height) / 2, (1 - side / width) / 2, side / height, side / width], dim=1)
    boxes, fits = draw_boxes(sizes, (augment.crop_area, 1.0), augment.crop_ratio, generator("crop", seed, epoch))
    return torch.where(fits[:, None], boxes, _central(sizes, augment.crop_ratio)) / sizes[:, [0, 1, 0, 1]]


def draw_boxes(
    sizes: torch.Tensor, area: tuple[float, float], ratio: float, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a rectangle of whole pixels within each image.

    The area is uniform, the ratio of width to height log-uniform. Of `NUM_TRIES` sizes, the first that fits is taken.

    Args:
        sizes: int `[N, 2]`, height and width of each image.
        area: smallest and largest share of the image.
        ratio: largest ratio of the longer side to the shorter one.

    Returns:
        float32 `[N, 4]`, (top, left, height, width), and bool `[N]`, whether a size did fit.
    """
    drawn = [_draw_chunk(chunk.float(), area, math.log(ratio), random) for chunk in sizes.split(_CHUNK)]
    boxes, fits = zip(*drawn, strict=True)
    return torch.cat(boxes), torch.cat(fits)


def inside(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns which pixels of an image are in a rectangle, bool `[B, 1, height, width]`.

    Args:
        boxes: float32 `[B, 4]`: top, left, height, width as fractions, whose edges are rounded to pixels.
    """
    top, left = boxes[:, 0:1], boxes[:, 1:2]
    rows = _between(torch.arange(height, device=boxes.device), top * height, (top + boxes[:, 2:3]) * height)
    columns = _between(torch.arange(width, device=boxes.device), left * width, (left + boxes[:, 3:4]) * width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _between(positions: torch.Tensor, first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    return (positions >= first.round()) & (positions < end.round())


def _draw_chunk(
    sizes: torch.Tensor, area: tuple[float, float], log_ratio: float, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    uniform = torch.rand(len(sizes), NUM_TRIES + 1, 2, generator=random)
    image_height, image_width = sizes[:, 0:1], sizes[:, 1:2]
    pixels = (area[0] + (area[1] - area[0]) * uniform[:, :-1, 0]) * (image_height * image_width)
    root_ratio = ((uniform[:, :-1, 1] - 0.5) * log_ratio).exp_()
    side = pixels.sqrt_()
    heights, widths = (side / root_ratio).round_(), (side * root_ratio).round_()
    fits = (heights >= 1) & (heights <= image_height) & (widths >= 1) & (widths <= image_width)
    first = fits.byte().argmax(dim=1, keepdim=True)
    size = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1)
    most = (sizes - size).clamp_(min=0)
    corner = torch.minimum((uniform[:, -1] * (most + 1)).floor_(), most)
    return torch.cat([corner, size], dim=1), fits.any(dim=1)


def _central(sizes: torch.Tensor, ratio: float) -> torch.Tensor:
    """Returns the largest rectangle at the centre whose ratio is within the limits, float32 `[N, 4]`."""
    height, width = sizes.float().unbind(1)
    kept_height = torch.minimum(height, (width * ratio).round())
    kept_width = torch.minimum(width, (height * ratio).round())
    top, left = ((height - kept_height) / 2).floor(), ((width - kept_width) / 2).floor()
    return torch.stack([top, left, kept_height, kept_width], dim=1)
