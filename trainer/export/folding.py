"""The exported form of a network: the same function in fewer operations.

`fold` merges batch norms into the convolutions before them, and the normalisation of pixels and constant divisors into
the neighbouring weights. It computes in float64 and rounds once. The parity check verifies that outputs stay the same.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from trainer.evaluation.views import average_views
from trainer.models import Classifier
from trainer.recipes import TestTimeViews

MAX_MEAN_TO_STD = 4.0
"""Largest mean, in standard deviations, that is folded into a convolution."""


class ExportModule(nn.Module):
    """The module that is exported: takes pixels, returns logits and probabilities.

    Args:
        network: takes `(pixels - mean) / std` as floats, returns logits.
        mean: float32 `[1, C, 1, 1]`, or None where the network's weights already subtract it.
        std: float32 `[1, C, 1, 1]`, or None where the network's weights already divide by it.
        views: the views of each image whose logits are averaged.
    """

    pixel_mean: torch.Tensor | None
    pixel_std: torch.Tensor | None

    def __init__(
        self, network: nn.Module, mean: torch.Tensor | None, std: torch.Tensor | None, views: TestTimeViews
    ) -> None:
        super().__init__()
        self.network = network
        self.views = views
        # Names that no operator has: an ONNX file names what it computes after operators, such as `mean`.
        self.register_buffer("pixel_mean", mean)
        self.register_buffer("pixel_std", std)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits and probabilities, both float32 `[B, classes]`, for images uint8 `[B, C, H, W]`."""
        logits = average_views(self._logits, images, self.views)
        return logits, logits.softmax(dim=1)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float()
        if self.pixel_mean is not None:
            pixels = pixels - self.pixel_mean
        if self.pixel_std is not None:
            pixels = pixels / self.pixel_std
        logits: torch.Tensor = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return logits


def fold(classifier: Classifier, views: TestTimeViews = "one") -> ExportModule:
    """Returns a folded copy of a classifier, or a copy as it is if torch.fx cannot trace it by its images alone.

    Args:
        classifier: on the CPU, in evaluation mode; not changed.
        views: the views of each image whose logits the copy averages.
    """
    plain = _without_parametrizations(copy.deepcopy(classifier.network))
    network = _trace(plain)
    if network is None:
        return ExportModule(plain, classifier.mean, classifier.deviation, views).eval().requires_grad_(False)
    for node in list(network.graph.nodes):
        norm = _submodule(network, node)
        if isinstance(norm, nn.BatchNorm2d) and norm.weight is not None and norm.running_mean is not None:
            _fold_batch_norm(network, node)
        elif node.op == "call_function" and node.target is operator.truediv:
            _fold_divisor(network, node)
    mean: torch.Tensor | None = classifier.mean
    std: torch.Tensor | None = classifier.deviation
    if classifier.num_channels == classifier.mean.size(1):  # else subtracting the mean repeats the grey channel
        mean, std = _fold_normalization(network, classifier.mean, classifier.deviation)
    network.recompile()
    network.delete_all_unused_submodules()
    return ExportModule(network, mean, std, views).eval().requires_grad_(False)


def _without_parametrizations(network: nn.Module) -> nn.Module:
    """Gives weights that a network computes from others, as by `weight_norm`, their value."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
            # Not by torch's `remove_parametrizations`, which changes a class that the copied network has, too.
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return network


def _trace(network: nn.Module) -> fx.GraphModule | None:
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # a network whose code depends on values cannot be traced
        return None
    # An option, such as a mask of the attention, would be traced as if it were given.
    return traced if sum(node.op == "placeholder" for node in traced.graph.nodes) == 1 else None


def _fold_batch_norm(network: fx.GraphModule, node: fx.Node) -> None:
    """Merges a batch norm into its convolution, unless something else reads the convolution's output.

    Max-poolings between the two may stay: scaling by positive numbers keeps the order of values, and so the maximum.
    """
    norm = _submodule(network, node)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    source = _input_node(node)
    while source.target is F.max_pool2d and len(source.users) == 1 and bool((scale > 0).all()):
        source = _input_node(source)
    conv = _submodule(network, source)
    if not isinstance(conv, nn.Conv2d) or len(source.users) > 1:
        return
    bias = 0 if conv.bias is None else conv.bias.double() * scale
    _set_weights(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), shift + bias)
    _remove_node(network, node)


def _fold_divisor(network: fx.GraphModule, node: fx.Node) -> None:
    """Merges a division by a constant into the fully connected layer before it."""
    source, divisor = node.args
    linear = _submodule(network, source) if isinstance(source, fx.Node) else None
    if not isinstance(linear, nn.Linear) or not isinstance(divisor, int | float) or len(_input_node(node).users) > 1:
        return
    bias = None if linear.bias is None else linear.bias.double() / divisor
    _set_weights(linear, linear.weight.double() / divisor, bias)
    _remove_node(network, node)


def _fold_normalization(
    network: fx.GraphModule, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Merges the normalisation of pixels into the first convolution.

    The mean stays a subtraction in two cases: where the convolution pads, because its zeros stand for the mean; and
    where the mean is many standard deviations from 0, because the difference of two large numbers loses precision.

    Returns:
        The mean and the standard deviation that are still to be applied, None for those that were merged.
    """
    (images,) = (node for node in network.graph.nodes if node.op == "placeholder")
    conv = _submodule(network, next(iter(images.users)))
    if len(images.users) > 1 or not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        return mean, std
    weight = conv.weight.double() / std.double()
    bias = None if conv.bias is None else conv.bias.double()
    if any(conv.padding) or bool((mean > MAX_MEAN_TO_STD * std).any()):
        _set_weights(conv, weight, bias)
        return mean, None
    offset = (weight * mean.double()).sum(dim=(1, 2, 3))
    _set_weights(conv, weight, -offset if bias is None else bias - offset)
    return None, None


def _submodule(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Returns the module that a node calls, unless its weights must not change: others call it, or read its weights, or
    it has hooks, which may set them."""
    if node.op != "call_module":
        return None
    readers = (other for other in network.graph.nodes if other.users and other.op in ("call_module", "get_attr"))
    module = network.get_submodule(str(node.target))
    if sum(f"{other.target}.".startswith(f"{node.target}.") for other in readers) > 1:
        return None
    return None if module._forward_pre_hooks or module._forward_hooks else module


def _input_node(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _set_weights(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)


def _remove_node(network: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(_input_node(node))
    network.graph.erase_node(node)
