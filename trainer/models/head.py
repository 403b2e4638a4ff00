"""The head of a network: its last fully connected layer, or the 1x1 convolution that classifies."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from trainer.errors import ConfigError


def find_head(network: nn.Module, images: torch.Tensor) -> str | None:
    """Returns the name of the last fully connected layer, or 1x1 convolution, that a network computes.

    Args:
        images: float `[B, C, H, W]`, on which the network is run in evaluation mode.
    """
    last: list[str] = []
    hooks = [
        module.register_forward_pre_hook(partial(lambda name, *_: last.append(name), name))
        for name, module in network.named_modules()
        if _is_linear(module)
    ]
    try:
        run_once(network, images)
    finally:
        for hook in hooks:
            hook.remove()
    return last[-1] if last else None


def run_once(network: nn.Module, images: torch.Tensor) -> object:
    """Returns what a network returns for images in evaluation mode, which changes nothing in it."""
    with _in_evaluation_mode(network), torch.no_grad():
        return network(images)


def has_gradient(network: nn.Module, images: torch.Tensor) -> bool:
    """Returns whether a network's output depends on parameters that can be trained."""
    with _in_evaluation_mode(network), torch.enable_grad():
        return bool(network(images).requires_grad)


@contextmanager
def _in_evaluation_mode(network: nn.Module) -> Iterator[None]:
    is_training = network.training
    try:
        network.eval()
        yield
    finally:
        network.train(is_training)


def fit_head(network: nn.Module, images: torch.Tensor, num_classes: int, *, name: str) -> str | None:
    """Replaces the head by a new one where the network has another number of outputs.

    Args:
        images: float `[B, C, H, W]`, as the network takes them.
        name: the network's name, for messages.

    Returns:
        The name of the layer that was replaced, if any.

    Raises:
        ConfigError: the network does not return one row of logits for each image, or its last layer does not make them.
    """
    output = run_once(network, images)
    shape = _shape(output)
    if shape == (len(images), num_classes):
        return None
    head = find_head(network, images)
    layer = network.get_submodule(head) if head is not None else None
    if head is None or len(shape) != 2 or shape[0] != len(images) or _num_outputs(layer) != shape[1]:
        check_logits(output, len(images), num_classes, name=name)  # raises: the shape is another one
    assert head is not None
    network.set_submodule(head, _with_outputs(layer, num_classes))
    return head


def check_logits(output: object, num_images: int, num_classes: int, *, name: str) -> None:
    """Checks what a network returns.

    Args:
        name: the network's name, for messages.

    Raises:
        ConfigError: it is not one row of logits for each image.
    """
    is_float = isinstance(output, torch.Tensor) and output.is_floating_point()
    if is_float and _shape(output) == (num_images, num_classes):
        return
    found = type(output).__name__
    if isinstance(output, torch.Tensor):
        found = " x ".join(map(str, output.shape)) or "one number"
        found += "" if is_float else f" of {output.dtype}"
    raise ConfigError(
        f"{name} returns {found} for {num_images} image{'s' if num_images > 1 else ''}: a network returns "
        f"{num_classes} logits for each of them"
    )


def _shape(output: object) -> tuple[int, ...]:
    return tuple(output.shape) if isinstance(output, torch.Tensor) else ()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def _num_outputs(layer: nn.Module | None) -> int:
    match layer:
        case nn.Linear():
            return layer.out_features
        case nn.Conv2d():
            return layer.out_channels
    return 0


def _with_outputs(layer: nn.Module | None, num_classes: int) -> nn.Module:
    has_bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, num_classes, 1, bias=has_bias)
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, num_classes, bias=has_bias)
