"""Augmentation of whole batches on the device, by random parameters that belong to the sample.

The parameters are a pure function of (seed, epoch, sample): the rank that gets a sample, its batch and the number of
restarts do not change how it is augmented. What may be done to an image is the recipe's `Augment`.
"""

import torch
import torch.nn.functional as F

from trainer.data.order import generator
from trainer.errors import ConfigError
from trainer.recipes import Augment


def check_shift(augment: Augment, image_size: int) -> None:
    """Raises ConfigError if the largest shift would move an image of `image_size` pixels out of itself."""
    if augment.shift >= image_size:
        raise ConfigError(f"images of {image_size} pixels cannot be shifted by {augment.shift}: give a smaller --shift")


def draw_params(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Draws an epoch's augmentation parameters.

    Returns:
        float32 `[num_samples, 6]`: mirrored (0 or 1), dx, dy (pixels), angle (radians), scale x, scale y.
    """
    uniform = torch.rand(num_samples, 5, generator=generator("augment", seed, epoch)) * 2 - 1
    params = torch.empty(num_samples, 6)
    params[:, 0] = _draw_mirrored(augment, num_samples, seed, epoch)
    steps = 2 * augment.shift + 1
    shifts = ((uniform[:, 0:2] + 1) / 2 * steps).floor_().clamp_(max=steps - 1) - augment.shift
    params[:, 1:3] = uniform[:, 0:2] * augment.shift if augment.is_affine else shifts
    params[:, 3] = uniform[:, 2] * augment.rotate_degrees * torch.pi / 180
    params[:, 4:6] = 1 + uniform[:, 3:5] * augment.scale
    return params


def _draw_mirrored(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    if augment.flip == "none":
        return torch.zeros(num_samples)
    first = torch.randint(2, (num_samples,), generator=generator("mirror", seed))
    return (first ^ (epoch % 2)).float()


def augment_batch(
    augment: Augment, images: torch.Tensor, indices: torch.Tensor, augment_params: torch.Tensor
) -> torch.Tensor:
    """Returns the augmented batch `images[indices]`.

    Args:
        images: uint8 `[N, C, H, W]`, the whole set.
        indices: int64 `[B]`, on the device of `images`.
        augment_params: float32 `[B, 6]`, the rows of `draw_params` that belong to `indices`.

    Returns:
        `[B, C, H, W]`, uint8, or float32 in 0..255 after an affine map.
    """
    if augment.is_affine:
        return _affine(images[indices], augment_params)
    if augment.shift == 0 and augment.flip == "none":
        return images[indices]
    return _shift_and_mirror(augment, images, indices, augment_params)


def _shift_and_mirror(
    augment: Augment, images: torch.Tensor, indices: torch.Tensor, params: torch.Tensor
) -> torch.Tensor:
    # Gather, mirror, shift and pad are one read: where each output pixel comes from is computed per row and column.
    _, num_channels, height, width = images.shape
    dx, dy = params[:, 1:2].long(), params[:, 2:3].long()
    x = torch.arange(width, device=images.device)
    x = torch.where(params[:, 0:1] > 0, width - 1 - x, x) + dx
    y = torch.arange(height, device=images.device) + dy
    outside = None
    if augment.fill == "zero":
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        outside = ~inside[:, None]
        x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    else:
        x, y = _reflect(x, width), _reflect(y, height)
    pixel = (y[:, :, None] * width + x[:, None, :]).view(len(indices), 1, -1)
    flat = images[indices].flatten(2)
    out = flat.gather(2, pixel.expand(-1, num_channels, -1)).view(-1, num_channels, height, width)
    return out if outside is None else out.masked_fill_(outside, 0)


def _affine(batch: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    _, _, height, width = batch.shape
    mirrored, dx, dy, angle, scale_x, scale_y = params.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    sign = 1 - 2 * mirrored
    rows = [
        sign * cos / scale_x,
        -sin / scale_x,
        2 * dx / width,
        sign * sin / scale_y,
        cos / scale_y,
        2 * dy / height,
    ]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    return F.grid_sample(batch.float(), grid, align_corners=False)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflect positions outside [0, size) at the border pixels, which are not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
