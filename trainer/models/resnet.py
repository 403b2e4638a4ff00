"""ResNet-18, 34, 50, 101 and 152 (He et al., arXiv 1512.03385; page 16 of the lecture), for small images."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from trainer.models.layers import ConvNormRelu, check_image_size, he_initial_weights

MIN_IMAGE_SIZE = 8
Depth = Literal[18, 34, 50, 101, 152]
_WIDTHS = (64, 128, 256, 512)
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_FIRST_WITH_BOTTLENECKS = 50


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, each but the first begun at stride 2, mean over the map, linear layer.

    What differs from the paper, for small images: the stem is a 3x3 convolution of stride 1 without max-pool, not 7x7
    of stride 2 with one, so that 32x32 pixels meet the stages at 32, 16, 8 and 4; in a bottleneck the 3x3 convolution
    has the stride, not the 1x1 before it, as everyone does since. Shortcuts are 1x1 convolutions where the shape
    changes (the paper's option B).

    For 10 classes, millions of parameters and of multiply-adds:

        depth              18     34     50    101    152
        parameters      11.17  21.28  23.52  42.51  58.16
        for 1x28x28     455.8  935.9 1046.8 1974.9 2902.9
        for 3x32x32     555.4 1159.4 1297.8 2510.0 3722.1

    Args:
        num_channels: of the images.
        image_size: height and width in pixels; at least 8.
        num_classes: logits.
        depth: layers with weights, in the paper's count.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int, depth: Depth) -> None:
        super().__init__()
        check_image_size("ResNet", image_size, MIN_IMAGE_SIZE)
        expansion = 4 if depth >= _FIRST_WITH_BOTTLENECKS else 1
        self.stem = ConvNormRelu(num_channels, _WIDTHS[0], 3)
        blocks, before = [], _WIDTHS[0]
        for stage, (width, num_blocks) in enumerate(zip(_WIDTHS, _BLOCKS[depth], strict=True)):
            for number in range(num_blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                body = _bottleneck(before, width, stride) if expansion == 4 else _basic(before, width, stride)
                blocks.append(_Residual(body, before, width * expansion, stride))
                before = width * expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)
        he_initial_weights(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        logits: torch.Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits


class _Residual(nn.Module):
    """ReLU of the sum of a body and of its input, or of a projection of it where the shape changes."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _basic(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ConvNormRelu(inputs, width, 3, stride=stride), _conv_norm(width, width, 3))


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNormRelu(inputs, width, 1),
        ConvNormRelu(width, width, 3, stride=stride),
        _conv_norm(width, 4 * width, 1),
    )


def _conv_norm(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
