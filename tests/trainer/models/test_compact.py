"""Tests of the compact net: number of parameters, image sizes and initial weights."""

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models import num_parameters
from trainer.models.compact import CompactNet

WIDTHS = (16, 32, 32, 64)


def test_it_has_the_documented_number_of_parameters() -> None:
    assert num_parameters(CompactNet(num_channels=1, image_size=28, num_classes=10, widths=WIDTHS)) == 33_328


@pytest.mark.parametrize(("num_channels", "image_size"), [(1, 28), (3, 32), (3, 65), (1, 8)])
def test_other_image_sizes_are_taken(num_channels: int, image_size: int) -> None:
    net = CompactNet(num_channels=num_channels, image_size=image_size, num_classes=5, widths=WIDTHS)
    assert net(torch.randn(2, num_channels, image_size, image_size)).shape == (2, 5)


def test_convolutions_are_initialised_with_the_identity() -> None:
    net = CompactNet(num_channels=1, image_size=28, num_classes=10, widths=WIDTHS)
    features = torch.randn(1, 32, 7, 7)
    assert torch.allclose(net.blocks[1].conv(features), features, atol=1e-6)  # type: ignore[union-attr,operator]


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8 x 8"):
        CompactNet(num_channels=1, image_size=7, num_classes=10, widths=WIDTHS)
