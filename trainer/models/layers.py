"""Layers that several families share, and the initialisation of weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.kernels.operations import convolution, norm_activation


class ConvNormRelu(nn.Sequential):
    """A convolution that keeps the image size at stride 1 (odd kernels), batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, norm, _ = self.children()
        assert isinstance(conv, nn.Conv2d)
        return norm_activation(convolution(x, conv), norm, "relu")


class Dropout(nn.Module):
    """Dropout that depends on the sample's seed, the layer and the unit, and on nothing else.

    torch's own dropout draws from a generator of the process: after an interruption, or on another number of ranks, it
    would drop other units. This one hashes the counter (layer, unit), then hashes it again with the sample's seed:
    random numbers without a state, as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    `use_dropout_seeds` sets the seeds.

    Args:
        rate: share of units that become zero in training; the others are divided by `1 - rate`.
        layer: a number that is unique within the network, so that layers of equal size drop different units. A layer
            that is used several times in a forward pass takes the numbers after it, too.
        dims: leading dimensions in which units are dropped one by one; the others are dropped together: 1 drops whole
            samples (stochastic depth, arXiv 1603.09382), 2 whole channels, None single values.
    """

    def __init__(self, rate: float, *, layer: int, dims: int | None = None) -> None:
        super().__init__()
        self.rate = rate
        self.layer = layer
        self.dims = dims
        self.num_calls = 0
        self.seeds: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[B, ...]` with dropped units in training, and unchanged in evaluation.

        Raises:
            RuntimeError: the network is in training mode outside of `use_dropout_seeds`.
        """
        if not self.training:
            return x
        if self.seeds is None:
            raise RuntimeError("a network with dropout can be trained within `use_dropout_seeds` only")
        shape = x.shape if self.dims is None else (*x.shape[: self.dims], *[1] * (x.ndim - self.dims))
        units = torch.arange(math.prod(shape[1:]), device=x.device) + ((self.layer + self.num_calls) << 24)
        self.num_calls += 1
        numbers = _hash(_hash(units) ^ self.seeds[:, None])
        is_kept = (numbers >= round(self.rate * 2**32)).view(shape)
        return x * is_kept.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate}, layer={self.layer}"


@contextmanager
def use_dropout_seeds(dropouts: list[Dropout], seeds: torch.Tensor) -> Iterator[None]:
    """Context in which these layers drop by the samples' seeds, int64 `[B]`, of `data.order.dropout_seeds`."""
    for dropout in dropouts:
        dropout.seeds, dropout.num_calls = seeds, 0
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.seeds = None


def dropout_layers(network: nn.Module) -> list[Dropout]:
    """Returns the `Dropout` layers of a network."""
    return [module for module in network.modules() if isinstance(module, Dropout)]


def _hash(numbers: torch.Tensor) -> torch.Tensor:
    """Permutes 0 to 2^32 - 1 so that each bit depends on all bits: T. Mueller's 32-bit hash, in int64."""
    for _ in range(2):
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B & 0xFFFFFFFF
    return (numbers >> 16) ^ numbers


@torch.no_grad()
def init_kaiming(network: nn.Module) -> None:
    """Initialises convolutions with normal weights of variance 2 / fan-in and zero biases.

    He et al., arXiv 1502.01852. torch's default, made for another non-linearity, loses a factor of 6 in variance per
    layer: without norms, the outputs of ten layers are next to zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                module.bias.zero_()


def check_image_size(family: str, image_size: int, smallest: int) -> None:
    """Checks that a family can take images of this size.

    Args:
        family: the family's name, for the message.
        image_size: height and width in pixels.
        smallest: the smallest size that the family takes.

    Raises:
        ConfigError: the images are too small.
    """
    if image_size < smallest:
        raise ConfigError(
            f"{family} takes images of at least {smallest} x {smallest} pixels, not {image_size} x {image_size}"
        )


def check_widths(network: str, widths: tuple[int, ...], example: tuple[int, ...], *, any_number: bool = False) -> None:
    """Checks the widths that a recipe gives a network.

    Args:
        network: for the message.
        example: widths that the network takes.
        any_number: the network takes any number of widths, not only as many as in `example`.

    Raises:
        ConfigError: a width is below 1, or there are too few or too many.
    """
    is_number_right = len(widths) > 0 if any_number else len(widths) == len(example)
    if not is_number_right or min(widths) < 1:
        number = "one or more widths" if any_number else f"{len(example)} widths"
        given = ",".join(map(str, widths)) or "none"
        shown = ",".join(map(str, example))
        raise ConfigError(f"{network} has {number} of at least 1, not {given}: give them, as in --set widths={shown}")
