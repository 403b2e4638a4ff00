"""Random numbers in networks that Convoy did not write: replaced by seeded ones where that is exact.

`torch.nn.Dropout` and its relatives draw from a generator of the process, so their numbers depend on the rank and on
restarts. `layers.Dropout` drops by the sample's seed; it takes the place of each module whose first dimension is the
batch.
"""

import copy
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.models.head import run_once
from trainer.models.layers import Dropout, dropout_layers, use_dropout_seeds

NUM_TRIAL_IMAGES = 3
"""Other dimensions of a network are rarely 3."""
_MAX_LAYERS = 256
"""Numbers of layers that `layers.Dropout` keeps apart."""


def seed_dropouts(network: nn.Module, images: torch.Tensor) -> None:
    """Replaces the modules that drop at random by seeded ones, at the same rates.

    Args:
        images: float `[NUM_TRIAL_IMAGES, C, H, W]`, as the network takes them.
    """
    calls, batch_calls = _count_calls(network, images)
    layer = max((each.layer + 1 for each in dropout_layers(network)), default=0)
    for name, number in calls.items():
        seeded = _seeded(network.get_submodule(name), layer)
        if seeded is not None and batch_calls[name] == number and layer + number <= _MAX_LAYERS:
            network.set_submodule(name, seeded)
            layer += number


def train_once(network: nn.Module, images: torch.Tensor) -> tuple[object, bool]:
    """Returns what a network returns for images in training mode, and whether it draws random numbers of its own."""
    trial = copy.deepcopy(network).train()  # batch norms update their statistics
    seeds = torch.arange(len(images))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), use_dropout_seeds(dropout_layers(trial), seeds):
        before = torch.get_rng_state()
        output = trial(images)
        return output, not torch.equal(torch.get_rng_state(), before)


def _seeded(module: nn.Module, layer: int) -> Dropout | None:
    """Returns the seeded form of a module that drops at random; None for any other module."""
    kind = type(module).__name__
    library = type(module).__module__.partition(".")[0]
    if isinstance(module, nn.Dropout) and module.p < 1:
        return Dropout(module.p, layer=layer)
    if isinstance(module, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) and module.p < 1:
        return Dropout(module.p, layer=layer, dims=2)
    if (library, kind) == ("torchvision", "StochasticDepth") and module.mode == "row":
        return Dropout(float(module.p), layer=layer, dims=1)  # type: ignore[arg-type]
    if (library, kind) == ("timm", "DropPath") and module.scale_by_keep:
        return Dropout(float(module.drop_prob), layer=layer, dims=1)  # type: ignore[arg-type]
    return None


def _count_calls(network: nn.Module, images: torch.Tensor) -> tuple[Counter[str], Counter[str]]:
    """Returns how often each module that drops is called in a forward pass, and how often with a batch of images."""
    calls: Counter[str] = Counter()
    batch_calls: Counter[str] = Counter()

    def note(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[name] += 1
        batch_calls[name] += inputs[0].ndim > 1 and len(inputs[0]) == len(images)

    hooks = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in network.named_modules()
        if (seeded := _seeded(module, 0)) is not None and seeded.rate > 0
    ]
    try:
        if hooks:
            run_once(network, images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, batch_calls
