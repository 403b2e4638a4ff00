"""Networks of torchvision and timm, frozen parts, and the head, before the first step."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.models import Classifier
from trainer.models.head import find_head
from trainer.models.layers import dropout_layers
from trainer.models.start import StartingNetwork, starting_network
from trainer.network_files import with_files
from trainer.recipes import RECIPES

ANY = RECIPES["any-network"]


def start(network: str, *, image_size: int = 64, lines: list[str] | None = None, **changes: object) -> StartingNetwork:
    recipe = replace(ANY, network=network, **changes)  # type: ignore[arg-type]
    log = [] if lines is None else lines
    return starting_network(recipe, num_channels=3, image_size=image_size, num_classes=5, log=log.append)


@pytest.mark.parametrize(
    ("name", "head", "dropouts"),
    [
        ("torchvision:squeezenet1_1", "classifier.1", [(0.5, None)]),
        ("torchvision:shufflenet_v2_x0_5", "fc", []),
        ("torchvision:mnasnet0_5", "classifier.1", [(0.2, None)]),
        ("timm:mobilenetv3_small_050", "classifier", []),
        ("timm:resnet10t", "fc", []),
    ],
)
def test_networks_by_name_have_the_classes_a_head_and_reproducible_dropout(
    name: str, head: str, dropouts: list[tuple[float, int | None]]
) -> None:
    lines: list[str] = []
    found = start(name, lines=lines, head_lr=10)
    images = torch.zeros(2, 3, 64, 64)
    assert found.network.eval()(images).shape == (2, 5)
    assert (found.head, find_head(found.network, images), found.normalization) == (head, head, None)
    assert [(each.rate, each.dims) for each in dropout_layers(found.network)] == dropouts
    assert lines == []


def test_stochastic_depth_and_drop_path_drop_by_the_sample() -> None:
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    from trainer.models.randomness import seed_dropouts, train_once

    network = nn.Sequential(StochasticDepth(0.3, "row"), DropPath(0.4), nn.Dropout(0.0), StochasticDepth(0.5, "batch"))
    images = torch.ones(3, 2, 4, 4)
    seed_dropouts(network, images)
    assert train_once(network, images)[1]
    assert [(each.rate, each.layer, each.dims) for each in dropout_layers(network)] == [(0.3, 0, 1), (0.4, 1, 1)]


@pytest.mark.parametrize(
    ("name", "image_size", "problem"),
    [
        ("torchvision:resnet_18", 64, r"no network of torchvision 'resnet_18': did you mean .*resnet18"),
        ("torchvision:vit_b_16", 30, r"torchvision:vit_b_16 cannot take images of 30 pixels: "),
        ("torchvision:squeezenet1_1", 8, r"torchvision:squeezenet1_1 cannot take images of 8 pixels: "),
        ("timm:resnet_18", 64, r"no network of timm 'resnet_18': did you mean resnet18"),
        ("resnet_18", 64, r"no network 'resnet_18': did you mean resnet18"),
    ],
)
def test_unknown_names_and_sizes_are_one_line(name: str, image_size: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        start(name, image_size=image_size)


def test_without_timm_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="timm:resnet18 needs timm, which is not installed: pip install timm"):
        start("timm:resnet18")


def test_weights_of_timm_are_normalised_as_its_configuration_says(tmp_path: Path) -> None:
    network = start("timm:tf_mobilenetv3_small_minimal_100").network
    torch.save(network.state_dict(), tmp_path / "w.pth")
    recipe = with_files(replace(ANY, network="timm:tf_mobilenetv3_small_minimal_100", weights=str(tmp_path / "w.pth")))
    found = starting_network(recipe, num_channels=1, image_size=64, num_classes=5, log=lambda line: None)
    assert found.num_channels == 3
    assert found.normalization == ((127.5,) * 3, (127.5,) * 3)
    chosen = replace(recipe, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0))
    found = starting_network(chosen, num_channels=3, image_size=64, num_classes=5, log=lambda line: None)
    assert found.normalization == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


def test_a_frozen_part_keeps_its_statistics_in_training(tmp_path: Path) -> None:
    lines: list[str] = []
    found = start("resnet18", image_size=32, lines=lines, freeze_until="blocks.4")
    model = Classifier(found.network, torch.zeros(3), torch.ones(3), frozen_norms=found.frozen_norms).train()
    frozen = {id(norm) for norm in found.frozen_norms}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [id(norm) not in frozen for norm in norms]
    assert 0 < len(frozen) < len(norms)
    assert not any(parameter.requires_grad for norm in found.frozen_norms for parameter in norm.parameters())
    assert lines[0].endswith("parameters are trained: those from blocks.4 on")
    with pytest.raises(ConfigError, match=r"no module of resnet18 'blocks.9': did you mean blocks"):
        start("resnet18", image_size=32, freeze_until="blocks.9")
    with pytest.raises(ConfigError, match="--freeze-until stem: resnet18 has no weights before it"):
        start("resnet18", image_size=32, freeze_until="stem")
