"""Random erasing: a random rectangle of an image gets the image's mean colour (Zhong et al., arXiv 1708.04896).

torchvision and timm erase after the normalisation, with 0, which is the mean colour of the data set. Here the network
normalises, later, and the colour is the mean of the image itself.
"""

import torch

from trainer.data.augment.boxes import draw_boxes, inside
from trainer.data.augment.choice import apply_where
from trainer.data.order import generator
from trainer.recipes.augmentation import Augment

SMALLEST_AREA = 0.02
LARGEST_RATIO = 10 / 3

_GRID = 1024
"""Steps of an axis in which rectangles are drawn; the size of the images is not known then."""


def draw_erased(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Draws the rectangles.

    Returns:
        float32 `[num_samples, 4]`: top, left, height, width as fractions; zeros for an image that stays as it is.
    """
    random = generator("erase", seed, epoch)
    is_erased = torch.rand(num_samples, 1, generator=random) < augment.erase
    sizes = torch.tensor([_GRID, _GRID]).expand(num_samples, 2)
    boxes, fits = draw_boxes(sizes, (SMALLEST_AREA, augment.erase_area), LARGEST_RATIO, random)
    return boxes.div_(_GRID).mul_(is_erased & fits[:, None])


def erase(batch: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Erases a rectangle of each image.

    Args:
        batch: `[B, C, H, W]`, uint8 or float32; on a CPU it is overwritten.
        boxes: float32 `[B, 4]`, rows of `draw_erased`.
    """
    return apply_where(boxes[:, 2] > 0, batch, _erase, boxes)


def _erase(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    mean = images.mean(dim=(2, 3), keepdim=True, dtype=torch.float32)
    mean = mean if images.is_floating_point() else mean.round_().to(images.dtype)
    return torch.where(inside(boxes, *images.shape[2:]), mean, images)
