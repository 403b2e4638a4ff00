"""GoogLeNet (Szegedy et al., arXiv 1409.4842; page 15 of the lecture), for small images."""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.models.layers import ConvNormRelu, check_image_size, init_kaiming

MIN_IMAGE_SIZE = 12

_MODULES = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
"""Channels of each module's branches (the paper's table 1): 1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; projected pool."""
_POOL_BEFORE = (2, 7)
_STEM_WIDTH = 192


class GoogLeNet(nn.Module):
    """A stem, nine inception modules with max-pools before the third and the eighth, global mean, linear layer.

    Differences from the paper, for small images: the stem is one 3x3 convolution to the same 192 channels, without its
    pools, so that the modules see images of 32x32 pixels at 32, 16 and 8; each convolution has a batch norm, which
    makes the two auxiliary heads and the dropout unnecessary (Ioffe and Szegedy, arXiv 1502.03167).

    5,868,458 parameters and 1,105,337,344 multiply-adds for 1x28x28 images and 10 classes; 5,871,914 and 1,447,241,728
    for 3x32x32.

    Args:
        image_size: height and width in pixels; at least 12.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        check_image_size("GoogLeNet", image_size, MIN_IMAGE_SIZE)
        self.stem = ConvNormRelu(num_channels, _STEM_WIDTH, 3)
        modules, in_channels = [], _STEM_WIDTH
        for widths in _MODULES:
            modules.append(_Inception(in_channels, widths))
            in_channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.modules_in_turn = nn.ModuleList(modules)
        self.head = nn.Linear(in_channels, num_classes)
        init_kaiming(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        x = self.stem(images)
        for number, module in enumerate(self.modules_in_turn):
            if number in _POOL_BEFORE:
                x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
            x = module(x)
        logits: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class _Inception(nn.Module):
    """Four parallel branches: 1x1; 3x3; 5x5; 3x3 max-pool. The last three contain a 1x1 convolution."""

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, three_reduced, three, five_reduced, five, pooled = widths
        self.one = ConvNormRelu(in_channels, one, 1)
        self.three = nn.Sequential(ConvNormRelu(in_channels, three_reduced, 1), ConvNormRelu(three_reduced, three, 3))
        self.five = nn.Sequential(ConvNormRelu(in_channels, five_reduced, 1), ConvNormRelu(five_reduced, five, 5))
        self.pooled = ConvNormRelu(in_channels, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(pooled)], dim=1)
