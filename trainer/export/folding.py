"""The network as it is exported: the same function with fewer operations.

Batch norms go into the convolutions before them, the normalisation of pixels and constant divisors into the weights
next to them. Computed in float64 and rounded once; that the answers stay the same is for the parity gate to say.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from trainer.models import Classifier

LARGEST_OFFSET = 4.0
"""Deviations that the mean may be from 0 where it is folded in a convolution."""


class ServedModel(nn.Module):
    """What is exported: pixels in, logits and probabilities out.

    Args:
        network: takes pixels as floats, less `mean`, over `deviation`; gives logits.
        mean: float32 `[1, C, 1, 1]`, or None where the network's own weights subtract it.
        deviation: likewise.
    """

    mean: torch.Tensor | None
    deviation: torch.Tensor | None

    def __init__(self, network: nn.Module, mean: torch.Tensor | None, deviation: torch.Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities, both float32 `[B, classes]`, of images uint8 `[B, C, H, W]`."""
        pixels = images.float()
        if self.mean is not None:
            pixels = pixels - self.mean
        if self.deviation is not None:
            pixels = pixels / self.deviation
        logits = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return logits, logits.softmax(dim=1)


def fold(classifier: Classifier) -> ServedModel:
    """The classifier (on the CPU, float32, in evaluation mode) with all folded that can be; it is left as it is."""
    network = fx.symbolic_trace(copy.deepcopy(classifier.network))
    for node in list(network.graph.nodes):
        if isinstance(_module(network, node), nn.BatchNorm2d):
            _fold_norm(network, node)
        elif node.op == "call_function" and node.target is operator.truediv:
            _fold_divisor(network, node)
    mean, deviation = _fold_normalization(network, classifier.mean, classifier.deviation)
    network.recompile()
    network.delete_all_unused_submodules()
    return ServedModel(network, mean, deviation).eval().requires_grad_(False)


def _fold_norm(network: fx.GraphModule, node: fx.Node) -> None:
    """Put a batch norm into its convolution, if only that reads it; max-poolings between them may stay.

    They give the largest value, and norms that multiply by positive numbers keep what is largest.
    """
    norm = _module(network, node)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    source = _source(node)
    while source.target is F.max_pool2d and len(source.users) == 1 and bool((scale > 0).all()):
        source = _source(source)
    conv = _module(network, source)
    if not isinstance(conv, nn.Conv2d) or len(source.users) > 1:
        return
    bias = 0 if conv.bias is None else conv.bias.double() * scale
    _replace(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), shift + bias)
    _drop(network, node)


def _fold_divisor(network: fx.GraphModule, node: fx.Node) -> None:
    """Put a division by a number into the fully connected layer before it."""
    source, divisor = node.args
    linear = _module(network, source) if isinstance(source, fx.Node) else None
    if not isinstance(linear, nn.Linear) or not isinstance(divisor, int | float) or len(_source(node).users) > 1:
        return
    bias = None if linear.bias is None else linear.bias.double() / divisor
    _replace(linear, linear.weight.double() / divisor, bias)
    _drop(network, node)


def _fold_normalization(
    network: fx.GraphModule, mean: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Put the normalisation into the first convolution; returns what is left of mean and deviation.

    A convolution that pads needs the mean subtracted before: its zeros stand for the mean. So does one whose pixels are
    all far from 0 for their deviation: what is large would be subtracted from what is large.
    """
    (images,) = (node for node in network.graph.nodes if node.op == "placeholder")
    conv = _module(network, next(iter(images.users)))
    if len(images.users) > 1 or not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        return mean, deviation
    weight = conv.weight.double() / deviation.double()
    bias = None if conv.bias is None else conv.bias.double()
    if any(conv.padding) or bool((mean > LARGEST_OFFSET * deviation).any()):
        _replace(conv, weight, bias)
        return mean, None
    offset = (weight * mean.double()).sum(dim=(1, 2, 3))
    _replace(conv, weight, -offset if bias is None else bias - offset)
    return None, None


def _module(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _replace(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)


def _drop(network: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(_source(node))
    network.graph.erase_node(node)
