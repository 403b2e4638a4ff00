"""VGG-16 and VGG-19 (Simonyan and Zisserman, arXiv 1409.1556) for small images."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from trainer.models.layers import ConvNormRelu, check_image_size, init_kaiming

MIN_IMAGE_SIZE = 16
_WIDTHS = (64, 128, 256, 512, 512)
_CONVS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
Depth = Literal[16, 19]


class Vgg(nn.Module):
    """Five stages of 3x3 convolutions with a max-pool after each, global mean, one linear layer.

    Differences from the paper, for small images: one linear layer replaces the three fully connected ones, which hold
    nine tenths of its weights, and their dropout; pools round sizes up, so that 28 pixels suffice for five of them;
    each convolution has a batch norm, without which a net of this depth does not train from random weights (the paper
    grew it from a shallower one).

    For 3x32x32 images and 10 classes: VGG-16 has 14,724,042 parameters and 313,201,664 multiply-adds, VGG-19 20,035,018
    and 398,136,320; for 1x28x28: 14,722,890 and 267,646,976, 20,033,866 and 343,734,272.

    Args:
        image_size: height and width in pixels; at least 16.
        depth: layers with weights, as the paper counts them.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int, depth: Depth) -> None:
        super().__init__()
        check_image_size("VGG", image_size, MIN_IMAGE_SIZE)
        stages, in_channels = [], num_channels
        for width, num_convs in zip(_WIDTHS, _CONVS[depth], strict=True):
            in_widths = (in_channels, *[width] * (num_convs - 1))
            stages.append(nn.Sequential(*(ConvNormRelu(channels, width, 3) for channels in in_widths)))
            in_channels = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(in_channels, num_classes)
        init_kaiming(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        x = images
        for stage in self.stages:
            x = F.max_pool2d(stage(x), kernel_size=2, ceil_mode=True)
        logits: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return logits
