"""TrivialAugment (wide): one operation for each image, with a random strength.

Müller and Hutter, arXiv 2103.10158; the operations and strengths are those of torchvision's `TrivialAugmentWide`, with
bilinear interpolation.
"""

from functools import partial

import torch

from trainer.data.augment import colour
from trainer.data.augment.choice import apply_where
from trainer.data.augment.geometry import warp
from trainer.data.order import generator
from trainer.recipes.augmentation import Augment, Fill

NUM_STRENGTHS = 31

OPERATIONS = (
    "identity",
    "shear x",
    "shear y",
    "translate x",
    "translate y",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""In the order of the numbers in the first column of the parameters."""

_NUM_SIGNED = 10
"""The strengths of the first operations have a random sign."""
_FIRST_MOVING, _LAST_MOVING = OPERATIONS.index("shear x"), OPERATIONS.index("rotate")

_COLOUR_OPERATIONS = {
    "brightness": colour.adjust_brightness,
    "saturation": colour.adjust_saturation,
    "contrast": colour.adjust_contrast,
    "sharpness": colour.adjust_sharpness,
    "posterize": colour.posterize,
    "solarize": colour.solarize,
    "autocontrast": lambda images, _: colour.autocontrast(images),
    "equalize": lambda images, _: colour.equalize(images),
}


def draw_trivial(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Draws an operation and its strength for each sample.

    Returns:
        float32 `[num_samples, 2]`: the number of the operation, and the strength: a tangent for shears, pixels for
        translations, degrees for the rotation, a factor for the next four operations, then bits, and a level.
    """
    random = generator("trivial", seed, epoch)
    operation = torch.randint(len(OPERATIONS), (num_samples,), generator=random)
    number = torch.randint(NUM_STRENGTHS, (num_samples,), generator=random)
    sign = torch.randint(2, (num_samples,), generator=random) * 2 - 1
    strength = _strengths()[operation, number]
    strength = torch.where(operation < _NUM_SIGNED, strength * sign, strength)
    is_factor = (operation > _LAST_MOVING) & (operation < _NUM_SIGNED)
    return torch.stack([operation.float(), strength + is_factor], dim=1)


def apply_trivial(batch: torch.Tensor, params: torch.Tensor, fill: Fill = "zero") -> torch.Tensor:
    """Applies to each image its operation.

    Args:
        batch: float32 `[B, C, H, W]`; on a CPU it is overwritten.
        params: float32 `[B, 2]`, rows of `draw_trivial`.
        fill: content of the borders that an operation uncovers, as `geometry.warp` takes it.
    """
    operation, strength = params.unbind(1)
    moves = (operation >= _FIRST_MOVING) & (operation <= _LAST_MOVING)
    batch = apply_where(moves, batch, partial(_move, fill), operation, strength)
    for name, operate in _COLOUR_OPERATIONS.items():
        batch = apply_where(operation == OPERATIONS.index(name), batch, operate, strength)
    return batch


def _strengths() -> torch.Tensor:
    """Returns the strengths of the operations, float32 `[operations, strengths]`, without signs."""
    share = torch.linspace(0, 1, NUM_STRENGTHS)
    of = {
        "shear x": share * 0.99,
        "shear y": share * 0.99,
        "translate x": (share * 32).floor(),
        "translate y": (share * 32).floor(),
        "rotate": share * 135,
        "brightness": share * 0.99,
        "saturation": share * 0.99,
        "contrast": share * 0.99,
        "sharpness": share * 0.99,
        "posterize": 8 - (share * 6).round(),
        "solarize": 255 - share * 255,
    }
    return torch.stack([of.get(name, torch.zeros(NUM_STRENGTHS)) for name in OPERATIONS])


def _move(fill: Fill, images: torch.Tensor, operation: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Shears along an edge of the image, translates, or rotates about the centre."""
    _, _, height, width = images.shape
    shear_x, shear_y, shift_x, shift_y, degrees = (
        torch.where(operation == OPERATIONS.index(name), strength, 0)
        for name in ("shear x", "shear y", "translate x", "translate y", "rotate")
    )
    shear_x, shear_y = shear_x * (height / width), shear_y * (width / height)
    angle = degrees * (torch.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        cos,
        shear_x - sin * (height / width),
        shear_x - shift_x * (2 / width),
        shear_y + sin * (width / height),
        cos,
        shear_y - shift_y * (2 / height),
    ]
    return warp(images, torch.stack(rows, dim=1), fill)
