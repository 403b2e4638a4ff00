"""Blocks that several families share: a convolution with its norm, dropout, and He's initial weights."""

from collections.abc import Iterator
from contextlib import contextmanager

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


class Dropout(nn.Module):
    """Dropout whose zeros are a function of the sample's seed, the layer and the unit, and of nothing else.

    torch's own draws from a generator of the process, so that a run on other ranks, or one that was interrupted, drops
    other units. Here the counter (layer, unit) is hashed, and hashed again with the seed: random numbers without a
    state, as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). `dropping` sets the seeds.

    Args:
        rate: the share of units that is zero in training; the others are divided by what is left.
        layer: a number of its own within the network, so that two layers of one size do not drop the same units.
    """

    def __init__(self, rate: float, *, layer: int) -> None:
        super().__init__()
        self.rate = rate
        self.layer = layer
        self.seeds: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` as it is, but for the zeros in training.

        Raises:
            RuntimeError: in training, outside of `dropping`.
        """
        if not self.training:
            return x
        if self.seeds is None:
            raise RuntimeError("a network with dropout learns inside of `dropping` only")
        units = torch.arange(x[0].numel(), device=x.device) + (self.layer << 24)
        numbers = _mixed(_mixed(units) ^ self.seeds[:, None])
        is_kept = (numbers >= round(self.rate * 2**32)).view(x.shape)
        return x * is_kept.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate}, layer={self.layer}"


@contextmanager
def dropping(dropouts: list[Dropout], seeds: torch.Tensor) -> Iterator[None]:
    """Context in which these layers drop by the samples' seeds, int64 `[B]`, of `data.order.dropout_seeds`."""
    for dropout in dropouts:
        dropout.seeds = seeds
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.seeds = None


def dropouts_of(network: nn.Module) -> list[Dropout]:
    return [module for module in network.modules() if isinstance(module, Dropout)]


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """A one-to-one map of 0..2^32 - 1 in which each bit depends on all: T. Mueller's hash for 32 bits, in int64."""
    for _ in range(2):
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B & 0xFFFFFFFF
    return (numbers >> 16) ^ numbers


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
