"""AlexNet (Krizhevsky et al., 2012; page 14 of the lecture) for small images, optionally with batch norm."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from trainer.models.layers import Dropout, check_image_size, init_kaiming

MIN_IMAGE_SIZE = 16
_WIDTHS = (64, 192, 384, 256, 256)
_KERNELS = (5, 5, 3, 3, 3)
_POOL_AFTER = (0, 1, 4)


class AlexNet(nn.Module):
    """Five convolutions, max-pools 3x3 of stride 2 after the first, second and fifth, three fully connected layers.

    Differences from the paper, for small images: the first convolution is 5x5 of stride 1, not 11x11 of stride 4, and
    pools are padded, so that 32x32 pixels become 16, 8, 4, and 28x28 become 14, 7, 4; the hidden layers have 1,024
    units, not 4,096; the widths are those of the one-column form (arXiv 1404.5997); there is no local response
    normalisation. The inputs of the hidden layers have a dropout of 0.5, as in the paper; batch norm replaces it
    (Ioffe and Szegedy, arXiv 1502.03167).

    7,703,242 parameters and 171,486,208 multiply-adds for 1x28x28 images and 10 classes; 7,706,442 and 225,650,688 for
    3x32x32. Batch norm adds 3,200 parameters.

    Args:
        image_size: height and width in pixels; at least 16. Larger images only make the first hidden layer larger.
        batch_norm: adds norms after the convolutions and the hidden layers and removes their biases ("BN-AlexNet" on
            page 37).

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int, batch_norm: bool) -> None:
        super().__init__()
        check_image_size("AlexNet", image_size, MIN_IMAGE_SIZE)
        in_widths = (num_channels, *_WIDTHS[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, width, kernel, padding=kernel // 2, bias=not batch_norm)
            for in_channels, width, kernel in zip(in_widths, _WIDTHS, _KERNELS, strict=True)
        )
        self.conv_norms = nn.ModuleList(nn.BatchNorm2d(width) if batch_norm else nn.Identity() for width in _WIDTHS)
        final_size = (image_size + 7) // 8  # halved three times, rounded up
        sizes = (_WIDTHS[-1] * final_size**2, 1024, 1024)
        self.hidden = nn.ModuleList(
            nn.Linear(in_features, size, bias=not batch_norm) for in_features, size in pairwise(sizes)
        )
        self.hidden_norms = nn.ModuleList(nn.BatchNorm1d(size) if batch_norm else nn.Identity() for size in sizes[1:])
        self.dropouts = nn.ModuleList(
            nn.Identity() if batch_norm else Dropout(0.5, layer=number) for number in range(len(self.hidden))
        )
        self.head = nn.Linear(sizes[-1], num_classes)
        init_kaiming(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        x = images
        for number, (conv, norm) in enumerate(zip(self.convs, self.conv_norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if number in _POOL_AFTER:
                x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        x = x.flatten(1)
        for dropout, linear, norm in zip(self.dropouts, self.hidden, self.hidden_norms, strict=True):
            x = F.relu(norm(linear(dropout(x))))
        logits: torch.Tensor = self.head(x)
        return logits
