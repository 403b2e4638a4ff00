"""Augmentation of whole batches on the device, by random parameters that belong to the sample.

`draw` makes one row of parameters per sample for an epoch, a pure function of (seed, epoch, sample): which rank sees a
sample, in which batch and after how many restarts, does not change what it looks like.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from trainer.data.order import generator
from trainer.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """What may be done to a training image. The default does nothing."""

    flip: Literal["none", "alternating"] = "none"
    """`alternating`: mirrored at random in epoch 0, then every image in turn (airbench, arXiv 2404.00498)."""
    shift: int = 0
    """Largest translation in pixels, both ways."""
    fill: Literal["reflect", "zero"] = "reflect"
    """What a shift brings in at the border."""
    rotate_degrees: float = 0.0
    """Largest rotation, both ways. Rotation, scaling and their translation fill with zero, bilinear."""
    scale: float = 0.0
    """Largest relative change of size, both ways and for each axis on its own."""

    @property
    def is_affine(self) -> bool:
        return self.rotate_degrees > 0 or self.scale > 0

    def check(self, image_size: int) -> None:
        """Raises ConfigError where images of so many pixels would be shifted out of themselves."""
        if self.shift >= image_size:
            raise ConfigError(
                f"images of {image_size} pixels cannot be shifted by {self.shift}: the shift must be less"
            )

    def draw(self, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
        """The epoch's parameters, float32 `[num_samples, 6]`: mirrored (0 or 1), dx, dy, angle, scale x, scale y."""
        uniform = torch.rand(num_samples, 5, generator=generator("augment", seed, epoch)) * 2 - 1
        augment_params = torch.empty(num_samples, 6)
        augment_params[:, 0] = self._mirrored(num_samples, seed, epoch)
        steps = 2 * self.shift + 1
        shifts = ((uniform[:, 0:2] + 1) / 2 * steps).floor_().clamp_(max=steps - 1) - self.shift
        augment_params[:, 1:3] = uniform[:, 0:2] * self.shift if self.is_affine else shifts
        augment_params[:, 3] = uniform[:, 2] * self.rotate_degrees * torch.pi / 180
        augment_params[:, 4:6] = 1 + uniform[:, 3:5] * self.scale
        return augment_params

    def _mirrored(self, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
        if self.flip == "none":
            return torch.zeros(num_samples)
        first = torch.randint(2, (num_samples,), generator=generator("mirror", seed))
        return (first ^ (epoch % 2)).float()

    def __call__(self, images: torch.Tensor, indices: torch.Tensor, augment_params: torch.Tensor) -> torch.Tensor:
        """The augmented batch `images[indices]`.

        Args:
            images: uint8 `[N, C, H, W]`, the whole set.
            indices: int64 `[B]`, on the device of `images`.
            augment_params: float32 `[B, 6]`, the rows of `draw` that belong to `indices`.

        Returns:
            `[B, C, H, W]`, uint8, or float32 in 0..255 after an affine map.
        """
        if self.is_affine:
            return self._affine(images[indices], augment_params)
        if self.shift == 0 and self.flip == "none":
            return images[indices]
        return self._shift_and_mirror(images, indices, augment_params)

    def _shift_and_mirror(
        self, images: torch.Tensor, indices: torch.Tensor, augment_params: torch.Tensor
    ) -> torch.Tensor:
        # Gather, mirror, shift and pad are one read: where each output pixel comes from is computed per row and column.
        _, num_channels, height, width = images.shape
        dx, dy = augment_params[:, 1:2].long(), augment_params[:, 2:3].long()
        x = torch.arange(width, device=images.device)
        x = torch.where(augment_params[:, 0:1] > 0, width - 1 - x, x) + dx
        y = torch.arange(height, device=images.device) + dy
        outside = None
        if self.fill == "zero":
            inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
            outside = ~inside[:, None]
            x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
        else:
            x, y = _reflect(x, width), _reflect(y, height)
        pixel = (y[:, :, None] * width + x[:, None, :]).view(len(indices), 1, -1)
        flat = images[indices].flatten(2)
        out = flat.gather(2, pixel.expand(-1, num_channels, -1)).view(-1, num_channels, height, width)
        return out if outside is None else out.masked_fill_(outside, 0)

    def _affine(self, batch: torch.Tensor, augment_params: torch.Tensor) -> torch.Tensor:
        _, _, height, width = batch.shape
        mirrored, dx, dy, angle, scale_x, scale_y = augment_params.unbind(1)
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
