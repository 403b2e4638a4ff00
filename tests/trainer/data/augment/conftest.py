"""Images for the tests of augmentation."""

import pytest
import torch


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def photos(request: pytest.FixtureRequest) -> torch.Tensor:
    """Smooth images with some noise, and levels from dark to bright, uint8 `[6, 1 or 3, 20, 24]`."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand(6, request.param, 4, 5, generator=random) * torch.linspace(60, 255, 6)[:, None, None, None]
    smooth = torch.nn.functional.interpolate(coarse, (20, 24), mode="bilinear")
    return (smooth + 4 * torch.randn(smooth.shape, generator=random)).clamp(0, 255).to(torch.uint8)
