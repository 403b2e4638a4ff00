"""Tests of the lecture's net: number of parameters and image sizes."""

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models import num_parameters
from trainer.models.lecture import LectureNet


def test_it_has_the_lectures_parameters() -> None:
    assert num_parameters(LectureNet(num_channels=1, image_size=28, num_classes=10)) == 105_506


@pytest.mark.parametrize(("num_channels", "image_size"), [(1, 28), (3, 32), (3, 64), (1, 22)])
def test_other_image_sizes_are_taken(num_channels: int, image_size: int) -> None:
    net = LectureNet(num_channels=num_channels, image_size=image_size, num_classes=7)
    assert net(torch.randn(2, num_channels, image_size, image_size)).shape == (2, 7)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 22 x 22"):
        LectureNet(num_channels=1, image_size=21, num_classes=10)
