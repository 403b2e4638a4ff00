"""What a network costs: parameters, and multiply-adds of one image, counted without computing anything."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.models import num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an answer takes.

    Args:
        num_parameters: learnt numbers.
        multiply_adds: of convolutions and matrix products, for one image; the rest (norms, pools, ReLU) is not counted.
    """

    num_parameters: int
    multiply_adds: int


def cost_of(build: Callable[[], nn.Module], *, num_channels: int, image_size: int) -> Cost:
    """The cost of the network that `build` makes, which happens on torch's `meta` device: shapes without numbers."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build().eval()
        network(torch.empty(1, num_channels, image_size, image_size))
    # A multiply-add is two floating point operations.
    return Cost(num_parameters=num_parameters(network), multiply_adds=counter.get_total_flops() // 2)
