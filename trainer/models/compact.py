"""A small convnet that learns in a few epochs, made for the recipe `mnist-fast` and tuned on validation images."""

import torch
from torch import nn

from trainer.kernels.operations import convolution, global_maximum, norm_activation
from trainer.models.layers import check_image_size, check_widths

MIN_IMAGE_SIZE = 8


class CompactNet(nn.Module):
    """A stem and three 3x3 convs, each with norm and ReLU; three max-pools; global max-pool; linear head.

    33,328 parameters for 1x28x28 images, 10 classes and widths 16, 32, 32, 64. As in airbench (arXiv 2404.00498), whose
    optimizers suit it, the convolutions after the stem are initialised with the identity on their first channels, the
    norms have no scale, and the logits are divided by the number of the head's inputs.

    Args:
        image_size: height and width in pixels, at least 8.
        widths: channels of the stem and of the three convs.

    Raises:
        ConfigError: the images are too small, or the widths are impossible.
    """

    suits_kernels = True
    """Weights are used in their layers alone, so that a step may cast them together; a forward pass keeps no state."""

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        check_image_size("the compact net", image_size, MIN_IMAGE_SIZE)
        check_widths("the compact net", widths, (16, 32, 32, 64))
        self.stem = _Block(num_channels, widths[0], pool=True)
        pools = (True, False, True)
        pairs = zip(widths[:-1], widths[1:], pools, strict=True)
        self.blocks = nn.Sequential(*(_Block(in_channels, width, pool=pool) for in_channels, width, pool in pairs))
        with torch.no_grad():
            for block, in_channels in zip(self.blocks, widths, strict=False):
                assert isinstance(block, _Block)
                nn.init.dirac_(block.conv.weight[:in_channels])
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        features = global_maximum(self.blocks(self.stem(images)), is_training=self.training)
        logits: torch.Tensor = self.head(features) / self.head.in_features
        return logits


class _Block(nn.Module):
    def __init__(self, in_channels: int, width: int, *, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, momentum=0.4)
        self.norm.weight.requires_grad_(False)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm_activation(convolution(x, self.conv), self.norm, "relu", pool=2 if self.pool else 1)
