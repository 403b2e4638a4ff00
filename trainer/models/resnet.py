"""ResNet-18, 34, 50, 101 and 152 (He et al., arXiv 1512.03385; page 16 of the lecture) for small images."""

from typing import Literal

import torch
from torch import nn

from trainer.kernels.operations import linear, norm_activation
from trainer.models.layers import ConvNormRelu, check_image_size, init_kaiming

MIN_IMAGE_SIZE = 8
Depth = Literal[18, 34, 50, 101, 152]
_WIDTHS = (64, 128, 256, 512)
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_FIRST_WITH_BOTTLENECKS = 50


class ResNet(nn.Module):
    """A stem, four stages of residual blocks (the last three start with stride 2), global mean, linear layer.

    Differences from the paper, for small images: the stem is a 3x3 convolution of stride 1 without max-pool, not 7x7 of
    stride 2 with one, so that the stages see images of 32x32 pixels at 32, 16, 8 and 4. As in torchvision, the 3x3
    convolution of a bottleneck has the stride, not the 1x1 before it. Shortcuts are 1x1 convolutions where the shape
    changes (the paper's option B).

    For 10 classes, millions of parameters and of multiply-adds:

        depth              18     34     50    101    152
        parameters      11.17  21.28  23.52  42.51  58.16
        for 1x28x28     455.8  935.9 1046.8 1974.9 2902.9
        for 3x32x32     555.4 1159.4 1297.8 2510.0 3722.1

    Args:
        image_size: height and width in pixels; at least 8.
        depth: layers with weights, as the paper counts them.

    Raises:
        ConfigError: the images are too small.
    """

    suits_kernels = True
    """Weights are used in their layers alone, so that a step may cast them together; a forward pass keeps no state."""

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int, depth: Depth) -> None:
        super().__init__()
        check_image_size("ResNet", image_size, MIN_IMAGE_SIZE)
        expansion = 4 if depth >= _FIRST_WITH_BOTTLENECKS else 1
        self.stem = ConvNormRelu(num_channels, _WIDTHS[0], 3)
        blocks, in_channels = [], _WIDTHS[0]
        for stage, (width, num_blocks) in enumerate(zip(_WIDTHS, _BLOCKS[depth], strict=True)):
            for number in range(num_blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                body = _bottleneck(in_channels, width, stride) if expansion == 4 else _basic(in_channels, width, stride)
                blocks.append(_Residual(body, in_channels, width * expansion, stride))
                in_channels = width * expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(in_channels, num_classes)
        init_kaiming(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        return linear(self.blocks(self.stem(images)).mean(dim=(2, 3)), self.head)


class _Residual(nn.Module):
    """Computes ReLU(body(x) + x), or projects x first where the shape changes."""

    def __init__(self, body: nn.Sequential, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = body
        is_same_shape = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if is_same_shape else _ConvNorm(in_channels, out_channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *blocks, last = self.body.children()
        conv, norm = last.children()
        y = x
        for block in blocks:
            y = block(y)
        return norm_activation(conv(y), norm, "relu", residual=self.shortcut(x))


def _basic(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ConvNormRelu(in_channels, width, 3, stride=stride), _ConvNorm(width, width, 3))


def _bottleneck(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNormRelu(in_channels, width, 1),
        ConvNormRelu(width, width, 3, stride=stride),
        _ConvNorm(width, 4 * width, 1),
    )


class _ConvNorm(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        padding = kernel_size // 2
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, norm = self.children()
        return norm_activation(conv(x), norm, "none")
