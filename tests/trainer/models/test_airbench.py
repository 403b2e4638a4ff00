"""Tests of the airbench net: whitening, initial weights, frozen parameters and image sizes."""

import pytest
import torch
import torch.nn.functional as F

from trainer.errors import ConfigError
from trainer.models.airbench import AirbenchNet


@pytest.mark.parametrize(("num_channels", "image_size"), [(1, 28), (3, 32), (3, 65), (1, 20)])
def test_other_image_sizes_are_taken(num_channels: int, image_size: int) -> None:
    net = AirbenchNet(num_channels=num_channels, image_size=image_size, num_classes=5, widths=(8, 16, 32))
    assert net(torch.randn(2, num_channels, image_size, image_size)).shape == (2, 5)


def test_a_stride_reads_patches_that_do_not_overlap() -> None:
    shape = {"num_channels": 3, "image_size": 41, "num_classes": 5, "widths": (24, 8)}
    plain, strided = AirbenchNet(**shape), AirbenchNet(**shape, stride=2)
    images = torch.randn(2, 3, 41, 41)
    for net in (plain, strided):
        net.init_whitening(images)
    assert torch.equal(strided.whiten.weight, plain.whiten.weight)
    assert torch.allclose(strided.whiten(images), plain.whiten(images)[:, :, ::2, ::2], atol=1e-5)
    assert strided(images).shape == (2, 5)


def test_whitened_patches_are_uncorrelated_with_variance_one() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 3, 20, 20, generator=generator)
    images = F.avg_pool2d(noise, 3, stride=1, padding=1) + 0.5 * noise.mean(dim=1, keepdim=True)
    net = AirbenchNet(num_channels=3, image_size=20, num_classes=10, widths=(8, 8, 8))
    net.init_whitening(images)
    outputs = net.whiten(images).transpose(0, 1).flatten(1)[:12]
    covariance = outputs @ outputs.T / outputs.size(1)
    # Directions with little variance stay below 1, because 5e-4 is added to each variance.
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.02
    assert covariance.diagonal().max() < 1.01
    assert covariance.diagonal().median() > 0.95


def test_convolutions_are_initialised_with_the_identity() -> None:
    net = AirbenchNet(num_channels=3, image_size=32, num_classes=10, widths=(32, 64, 64))
    features = torch.randn(1, 24, 10, 10)
    assert torch.allclose(net.stages[0].conv1(features)[:, :24], features, atol=1e-6)  # type: ignore[union-attr,operator]


def test_whitening_weights_and_norm_scales_are_frozen() -> None:
    net = AirbenchNet(num_channels=3, image_size=32, num_classes=10, widths=(8, 8, 8))
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert "whiten.weight" in frozen
    assert "stages.0.norm1.weight" in frozen
    assert {"whiten.bias", "stages.0.norm1.bias"}.isdisjoint(frozen)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 20 x 20"):
        AirbenchNet(num_channels=3, image_size=16, num_classes=10, widths=(8, 8, 8))
    with pytest.raises(ConfigError, match="at least 40 x 40"):
        AirbenchNet(num_channels=3, image_size=39, num_classes=10, widths=(8, 8, 8), stride=2)


@pytest.mark.parametrize("size", [20, 24, 28, 32])
def test_a_residual_stage_adds_its_first_output_to_that_of_its_last_norm(size: int) -> None:
    shape = {"num_channels": 3, "image_size": size, "num_classes": 10, "widths": (4, 6, 8)}
    net, plain = AirbenchNet(**shape, is_residual=True), AirbenchNet(**shape)
    added = {name for name in net.state_dict() if name not in plain.state_dict()}
    assert {name.split(".")[2] for name in added} == {"conv3", "norm3"}
    stage = net.stages[0]
    for norm in (stage.norm2, stage.norm3):
        torch.nn.init.constant_(norm.weight, 0.0)  # without a part of the last two convolutions
    images = torch.randn(5, 24, 12, 12)
    first = F.gelu(stage.norm1(F.max_pool2d(stage.conv1(images), 2)))
    assert torch.allclose(stage(images), F.gelu(first), atol=1e-5)
    assert net(torch.randn(5, 3, size, size)).shape == (5, 10)
