"""Weights that are cast together, compared with autocast, which casts each on its own."""

import copy

import torch

from trainer.loop.casting import CastWeights
from trainer.models import Classifier
from trainer.models.compact import CompactNet


def test_weights_cast_together_give_autocasts_bits() -> None:
    torch.manual_seed(0)
    network = CompactNet(num_channels=1, image_size=8, num_classes=5, widths=(4, 8, 8, 8))
    model = Classifier(network, torch.tensor([120.0]), torch.tensor([60.0])).train()
    model.to(memory_format=torch.channels_last)
    twin, pixels = copy.deepcopy(model), torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = CastWeights(twin)(pixels, torch.bfloat16), model(pixels)
    assert torch.equal(ours, theirs)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    for (name, mine), expected in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (expected.grad is None), name
        if mine.grad is not None:
            assert torch.equal(mine.grad.float(), expected.grad), name
            assert mine.grad.stride() == mine.stride()


def test_frozen_weights_are_left_to_autocast() -> None:
    network = CompactNet(num_channels=1, image_size=8, num_classes=5, widths=(4, 8, 8, 8))
    network.stem.conv.weight.requires_grad_(False)
    model = Classifier(network, torch.tensor([120.0]), torch.tensor([60.0])).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        CastWeights(model)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.bfloat16).sum().backward()
    assert network.stem.conv.weight.grad is None
    assert network.head.weight.grad is not None
