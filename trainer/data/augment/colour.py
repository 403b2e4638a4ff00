"""Changes the colours of a batch: each operation takes one strength for each image.

The images are float32 `[B, C, H, W]` in 0..255, C is 1 or 3, and the results are as those of
`torchvision.transforms.functional` before it rounds to whole levels.
"""

import torch
import torch.nn.functional as F

from trainer.kernels.choice import is_fusible
from trainer.recipes.augmentation import Augment


def jitter(augment: Augment, images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue, in this order. (torchvision shuffles it for each image.)

    Args:
        images: uint8 or float32; the kernel reads either, without a copy.
        params: float32 `[B, 4]`: three factors, and the turn of the hue in -0.5..0.5.
    """
    brightness, contrast, saturation, hue = params.unbind(1)
    changes = {name: getattr(augment, name) > 0 for name in ("brightness", "contrast", "saturation")}
    if is_fusible(images) and images.is_contiguous() and any(changes.values()):
        from trainer.kernels import batches

        images = batches.jitter(images, params, **changes)
        return adjust_hue(images, hue) if augment.hue else images
    images = images.float()
    if augment.brightness:
        images = adjust_brightness(images, brightness)
    if augment.contrast:
        images = adjust_contrast(images, contrast)
    if augment.saturation:
        images = adjust_saturation(images, saturation)
    return adjust_hue(images, hue) if augment.hue else images


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies each image by its factor."""
    return (images * _each(factor)).clamp_(0, 255)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Moves each image away from its mean grey (factor > 1), or towards it."""
    return _blend(_grey(images).mean(dim=(1, 2, 3), keepdim=True), images, factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Moves each pixel away from its grey (factor > 1), or towards it. Grey images stay as they are."""
    return images if images.size(1) == 1 else _blend(_grey(images), images, factor)


def adjust_hue(images: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turns the hue of HSV by a share of the circle. Grey images stay as they are."""
    if images.size(1) == 1:
        return images
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = chroma.clamp(min=1e-3)
    # The hue in 0..6: 0 is red, 2 green, 4 blue.
    hue = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(value == red, (green - blue) / divisor, hue).add_(turn[:, None, None] * 6)
    # Each channel is below the value by a share of the chroma that depends on the distance of its hue.
    turned = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        sector = (hue + offset).remainder_(6)
        share = torch.minimum(sector, 4 - sector).clamp_(0, 1)
        torch.addcmul(value, share, chroma, value=-1, out=turned[:, channel])
    return turned


def adjust_sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Moves each image away from its blurred self (factor > 1), or towards it. The border stays as it is."""
    if min(images.shape[2:]) < 3:
        return images
    blurred = images.clone()
    centre = blurred[:, :, 1:-1, 1:-1]
    centre.mul_(4 / 13).add_(F.avg_pool2d(images, 3, stride=1), alpha=9 / 13)
    return _blend(blurred, images, factor)


def posterize(images: torch.Tensor, num_bits: torch.Tensor) -> torch.Tensor:
    """Keeps the upper bits of the 8 bits of each level."""
    step = _each(torch.exp2(8 - num_bits))
    return (images.round() / step).floor_().mul_(step)


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Inverts levels from the threshold on."""
    return torch.where(images >= _each(threshold), 255 - images, images)


def autocontrast(images: torch.Tensor) -> torch.Tensor:
    """Stretches the levels of each channel to 0..255; a channel with one level stays as it is."""
    low = images.amin(dim=(2, 3), keepdim=True)
    spread = images.amax(dim=(2, 3), keepdim=True) - low
    is_flat = spread < 0.5
    low, scale = low.masked_fill(is_flat, 0), (255 / spread).masked_fill(is_flat, 1)
    return ((images - low) * scale).clamp_(0, 255)


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Makes the levels of each channel equally frequent, as Pillow's `ImageOps.equalize` does."""
    # A rehearsal leaves images uncomputed, and after an index out of bounds a GPU computes nothing more.
    levels = images.round().long().clamp_(0, 255).flatten(2)
    counts = images.new_zeros(*levels.shape[:2], 256)
    counts.scatter_add_(2, levels, images.new_ones(1).expand(levels.shape))
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = ((levels.size(2) - brightest) / 255).floor_()
    below = counts.cumsum(dim=2) - counts
    table = ((below + (step / 2).floor_()) / step).floor_().clamp_(0, 255)
    unchanged = torch.arange(256, device=images.device, dtype=images.dtype)
    table = torch.where(step > 0, table, unchanged)
    return table.gather(2, levels).view(images.shape)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Returns the brightness of each pixel, `[B, 1, H, W]` (ITU-R BT.601)."""
    if images.size(1) == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    grey: torch.Tensor = red * 0.2989
    return grey.add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(start: torch.Tensor, end: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns `start + factor * (end - start)`, within 0..255."""
    return torch.lerp(start, end, _each(factor)).clamp_(0, 255)


def _each(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
