"""Moves the pixels of a batch: crop, flips, shifts, rotation and scale."""

import torch
import torch.nn.functional as F

from trainer.data.augment.choice import apply_where
from trainer.recipes.augmentation import Augment, Fill


def crop_and_resize(batch: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Cuts a rectangle out of each image and enlarges it to the size of the image, bilinear.

    Equals torchvision's `resized_crop` without antialiasing, which makes no difference: a crop is never reduced here.

    Args:
        batch: float32 `[B, C, H, W]`.
        boxes: float32 `[B, 4]`: top, left, height, width as fractions of the image.
    """
    _, _, height, width = batch.shape
    y = _positions(boxes[:, 0:1], boxes[:, 2:3], height)
    x = _positions(boxes[:, 1:2], boxes[:, 3:4], width)
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(batch, grid, padding_mode="border", align_corners=False)


def _positions(first: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Returns where the pixels of an axis come from, `[B, size]` in -1..1; no pixel beyond the crop has a part."""
    first, length = (first * size).round(), (length * size).round()
    centres = (torch.arange(size, device=first.device) + 0.5) * (length / size)
    centres = torch.minimum(centres.clamp_(min=0.5), length - 0.5)
    return (first + centres) * (2 / size) - 1


def move(augment: Augment, batch: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
    """Flips, shifts, rotates and scales.

    Args:
        batch: `[B, C, H, W]`, uint8 or float32.
        drawn: the columns `move` of the parameters, and `upside_down` if images are flipped vertically.

    Returns:
        A batch of the same dtype, or float32 after an affine map.
    """
    params, upside_down = drawn["move"], drawn.get("upside_down")
    if augment.is_affine:
        return _affine(augment, batch, params, upside_down)
    if augment.shift:
        return _shift_and_flip(augment, batch, params, upside_down)
    if augment.flip != "none":
        batch = apply_where(params[:, 0] > 0, batch, lambda images: images.flip(3))
    if upside_down is not None:
        batch = apply_where(upside_down[:, 0] > 0, batch, lambda images: images.flip(2))
    return batch


def _shift_and_flip(
    augment: Augment, batch: torch.Tensor, params: torch.Tensor, upside_down: torch.Tensor | None
) -> torch.Tensor:
    # Flip, shift and pad are one read: where each output pixel comes from is computed per row and column.
    _, num_channels, height, width = batch.shape
    dx, dy = params[:, 1:2].long(), params[:, 2:3].long()
    x = torch.arange(width, device=batch.device)
    x = torch.where(params[:, 0:1] > 0, width - 1 - x, x) + dx
    y = torch.arange(height, device=batch.device)
    if upside_down is not None:
        y = torch.where(upside_down > 0, height - 1 - y, y)
    y = y + dy
    outside = None
    if augment.fill == "zero":
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        outside = ~inside[:, None]
    if augment.fill == "reflect":
        x, y = _reflect(x, width), _reflect(y, height)
    else:
        x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    pixel = (y[:, :, None] * width + x[:, None, :]).view(len(batch), 1, -1)
    out = batch.flatten(2).gather(2, pixel.expand(-1, num_channels, -1)).view(batch.shape)
    return out if outside is None else out.masked_fill_(outside, 0)


def _affine(
    augment: Augment, batch: torch.Tensor, params: torch.Tensor, upside_down: torch.Tensor | None
) -> torch.Tensor:
    _, _, height, width = batch.shape
    mirrored, dx, dy, angle, scale_x, scale_y = params.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    sign = 1 - 2 * mirrored
    across, down = -sin / scale_x, cos / scale_y
    if upside_down is not None:
        sign_y = 1 - 2 * upside_down[:, 0]
        across, down = across * sign_y, down * sign_y
    rows = [sign * cos / scale_x, across, 2 * dx / width, sign * sin / scale_y, down, 2 * dy / height]
    return warp(batch.float(), torch.stack(rows, dim=1), augment.fill)


def warp(batch: torch.Tensor, maps: torch.Tensor, fill: Fill) -> torch.Tensor:
    """Returns the images under affine maps, bilinear.

    Args:
        batch: float32 `[B, C, H, W]`.
        maps: float32 `[B, 6]`, rows of 2 x 3 matrices from a pixel's position to that from which it comes, in -1..1.
        fill: `edge`: a pixel from outside of the image is that of its edge; black otherwise.
    """
    grid = F.affine_grid(maps.view(-1, 2, 3), list(batch.shape), align_corners=False)
    padding_mode = "border" if fill == "edge" else "zeros"
    return F.grid_sample(batch, grid, padding_mode=padding_mode, align_corners=False)


def resize(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the images at `size` x `size` pixels, float32, bilinear without antialiasing: made for small reductions.

    Args:
        batch: `[B, C, H, W]`, uint8 or float32.
    """
    return F.interpolate(batch.float(), size=(size, size), mode="bilinear", align_corners=False)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflect positions outside [0, size) at the border pixels, which are not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
