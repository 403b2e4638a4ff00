"""Network in network (Lin, Chen and Yan, arXiv 1312.4400) with batch norm: "BN-NIN" on page 37 of the lecture."""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.models.layers import ConvNormRelu, check_image_size, init_kaiming

MIN_IMAGE_SIZE = 8


class BatchNormNin(nn.Module):
    """Three convolutions, each followed by two 1x1 ones ("a network in it"), pools between, no fully connected layer.

    This is the paper's own net for CIFAR-10: 5x5x192, 160, 96; max-pool 3 of stride 2; 5x5x192, 192, 192; mean-pool 3
    of stride 2; 3x3x192, 192, classes; global mean. The difference: each convolution but the last has a batch norm,
    which replaces dropout (Ioffe and Szegedy, arXiv 1502.03167).

    958,794 parameters and 162,814,848 multiply-adds for 1x28x28 images and 10 classes; 968,394 and 222,486,528 for
    3x32x32.

    Args:
        image_size: height and width in pixels; at least 8.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        check_image_size("NIN", image_size, MIN_IMAGE_SIZE)
        self.first = nn.Sequential(
            ConvNormRelu(num_channels, 192, 5), ConvNormRelu(192, 160, 1), ConvNormRelu(160, 96, 1)
        )
        self.second = nn.Sequential(ConvNormRelu(96, 192, 5), ConvNormRelu(192, 192, 1), ConvNormRelu(192, 192, 1))
        self.third = nn.Sequential(ConvNormRelu(192, 192, 3), ConvNormRelu(192, 192, 1))
        self.classes = nn.Conv2d(192, num_classes, kernel_size=1)
        init_kaiming(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        x = F.max_pool2d(self.first(images), kernel_size=3, stride=2, padding=1)
        x = F.avg_pool2d(self.second(x), kernel_size=3, stride=2, padding=1)
        logits: torch.Tensor = self.classes(self.third(x)).mean(dim=(2, 3))
        return logits
