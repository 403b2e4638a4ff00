"""The part of a recipe that says what happens to training images, and its limits.

`trainer.data.augment` computes it. Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.errors import ConfigError
from trainer.recipes.hyperparameters import check_number

Flip = Literal["none", "alternating", "random"]
Fill = Literal["reflect", "zero", "edge"]
Policy = Literal["none", "trivial"]
Square = Literal["crop", "pad"]
"""How an image of any shape becomes a square, before it is augmented: by its centre alone, or whole, on white."""

_LIMITS: dict[str, tuple[float, float]] = {
    "crop_area": (0.01, 1),
    "crop_ratio": (1, 10),
    "shift": (0, math.inf),
    "rotate_degrees": (0, 180),
    "scale": (0, 0.9),
    "brightness": (0, 1),
    "contrast": (0, 1),
    "saturation": (0, 1),
    "hue": (0, 0.5),
    "erase": (0, 1),
    "erase_area": (0.02, 1),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "mix_share": (0, 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """The augmentation of training images. The default changes nothing.

    The order is that of the fields: crop, flips with shift, rotation and scale, policy, colours, erasing, mixing.

    Raises:
        ConfigError: a value is outside of its limits.
    """

    crop_area: float = 1.0
    """Smallest share of an image that a random resized crop keeps, such as 0.08 for ImageNet, 0.35 for small sets. 1:
    the centre, never at random."""
    crop_ratio: float = 4 / 3
    """Largest ratio of a random crop's longer side to the shorter one."""
    flip: Flip = "none"
    """Left-right mirroring. `alternating`: at random in epoch 0, then every image in turn (airbench, arXiv 2404.00498).
    `random`: every image in half of the epochs, at random."""
    flip_vertical: Literal["none", "random"] = "none"
    """Mirroring upside down, for images without an upper side, such as those of microscopes and satellites. `random`:
    every image in half of the epochs."""
    shift: int = 0
    """Largest translation in pixels, both ways."""
    fill: Fill = "reflect"
    """Content of the border that a shift uncovers. `edge`: the nearest pixel of the image, also where rotation, scaling
    or `policy` uncover a border, which otherwise is black."""
    rotate_degrees: float = 0.0
    """Largest rotation, both ways. Rotation, scaling and their translation are bilinear."""
    scale: float = 0.0
    """Largest relative change of size, both ways and for each axis on its own."""
    policy: Policy = "none"
    """`trivial`: one of 14 operations for each image, with a random strength (TrivialAugment wide, arXiv 2103.10158):
    shears, translations, rotation, brightness, saturation, contrast, sharpness, fewer bits, solarisation, autocontrast,
    equalisation, or none."""
    brightness: float = 0.0
    """Largest relative change of brightness, both ways, such as 0.4."""
    contrast: float = 0.0
    """Largest relative change of contrast, both ways, such as 0.4."""
    saturation: float = 0.0
    """Largest relative change of the saturation of colours, both ways, such as 0.4. Grey images stay as they are."""
    hue: float = 0.0
    """Largest turn of the hue, both ways, as a share of the colour circle, such as 0.1; 0.5 reaches every hue. Grey
    images stay as they are."""
    erase: float = 0.0
    """Probability that a random rectangle of an image gets the image's mean colour (random erasing, arXiv
    1708.04896), such as 0.25."""
    erase_area: float = 1 / 3
    """Largest share of an image that is erased; the smallest is 0.02."""
    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412), such as 0.2: images and labels are blended in pairs, with a weight from
    Beta(alpha, alpha). 0: no mixup. Without --virtual-shards, the pairs depend on the number of ranks."""
    cutmix: float = 0.0
    """Alpha of CutMix (arXiv 1905.04899), such as 1: a rectangle of an image comes from another one, and the label in
    proportion, with areas from Beta(alpha, alpha). 0: no CutMix. With mixup, each image gets one of them at random. The
    pairs are mixup's."""
    mix_share: float = 1.0
    """Share of the images to which mixup or CutMix, where they are on, applies."""

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            check_number(f"augment.{name}", getattr(self, name), least, most)

    @property
    def is_affine(self) -> bool:
        return self.rotate_degrees > 0 or self.scale > 0

    @property
    def crops(self) -> bool:
        """Whether random resized crop is on."""
        return self.crop_area < 1

    @property
    def jitters(self) -> bool:
        """Whether one of the colour changes is on."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    @property
    def mixes(self) -> bool:
        """Whether an image may become a mixture of two."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_share > 0


def check_shift(augment: Augment, image_size: int) -> None:
    """Raises ConfigError if the largest shift would move an image of `image_size` pixels out of itself."""
    if augment.shift >= image_size:
        raise ConfigError(f"images of {image_size} pixels cannot be shifted by {augment.shift}: give a smaller --shift")
