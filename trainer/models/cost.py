"""Counts a network's parameters and multiply-adds without running it on data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.models import num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of one forward pass.

    Args:
        num_parameters: frozen ones included.
        multiply_adds: of convolutions and matrix products for one image. Norms, pools and ReLU do not count.
    """

    num_parameters: int
    multiply_adds: int


def count_cost(build: Callable[[], nn.Module], *, num_channels: int, image_size: int) -> Cost:
    """Returns the cost of the network that `build` returns.

    The network is built and run on torch's `meta` device, where tensors have shapes and no values.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build().eval()
        network(torch.empty(1, num_channels, image_size, image_size))
    # torch counts a multiply-add as two floating point operations.
    return Cost(num_parameters=num_parameters(network), multiply_adds=counter.get_total_flops() // 2)
