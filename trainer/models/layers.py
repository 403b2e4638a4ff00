"""Blocks that several families share: a convolution with its norm, and He's initial weights."""

import torch
from torch import nn

from trainer.errors import ConfigError


class ConvNormRelu(nn.Sequential):
    """Convolution of odd kernel that keeps the size (at stride 1), batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


@torch.no_grad()
def he_initial_weights(network: nn.Module) -> None:
    """Normal weights of variance 2 / inputs for convolutions (He et al., arXiv 1502.01852), biases zero.

    torch's default, made for another non-linearity, loses a factor of 6 in variance per layer: without norms, ten
    layers answer with next to nothing.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                module.bias.zero_()


def check_image_size(family: str, image_size: int, smallest: int) -> None:
    """Raises ConfigError where a family cannot take images of this size."""
    if image_size < smallest:
        raise ConfigError(
            f"{family} takes images of at least {smallest} x {smallest} pixels, not {image_size} x {image_size}"
        )
