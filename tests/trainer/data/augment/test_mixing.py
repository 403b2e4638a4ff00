"""Mixup and CutMix."""

import pytest
import torch

from trainer.data.augment import draw_params, mix_batch
from trainer.recipes import Augment


def draw_shares(augment: Augment, num_samples: int) -> torch.Tensor:
    images = torch.zeros(num_samples, 1, 64, 64, dtype=torch.uint8)
    return mix_batch(augment, images, draw_params(augment, num_samples, 0, 0))[1]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    share = draw_params(Augment(mixup=alpha), 20_000, 0, 0)[:, 6]
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_mixup_blends_an_image_with_the_one_at_its_place_in_the_reverse_order(images: torch.Tensor) -> None:
    augment = Augment(mixup=0.4)
    mixed, share = mix_batch(augment, images, draw_params(augment, 50, 0, 0))
    assert mixed.dtype == torch.float32
    for number in range(50):
        own, partner = images[number].float(), images[49 - number].float()
        expected = share[number] * own + (1 - share[number]) * partner
        assert torch.allclose(mixed[number], expected, atol=1e-3)
    assert len(share.unique()) == 50


def test_cutmix_takes_a_rectangle_from_the_partner(images: torch.Tensor) -> None:
    """The share is that of the pixels, exactly; uint8 images stay uint8."""
    augment = Augment(cutmix=1.0)
    mixed, share = mix_batch(augment, images, draw_params(augment, 50, 0, 0))
    assert mixed.dtype == torch.uint8
    num_cut = 0
    for number in range(50):
        is_own = (mixed[number] == images[number]).all(dim=0)
        is_partners = (mixed[number] == images[49 - number]).all(dim=0)
        assert (is_own | is_partners).all()
        cut = (~is_own).nonzero()
        if len(cut):
            num_cut += 1
            (top, left), (bottom, right) = cut.amin(dim=0).tolist(), (cut.amax(dim=0) + 1).tolist()
            assert (~is_own)[top:bottom, left:right].all()
            assert share[number] == pytest.approx(1 - len(cut) / 144)
    assert num_cut > 35


def test_the_areas_of_cutmix_are_those_of_the_paper() -> None:
    """The centre is uniform over the image, and the rectangle is cut off at its border."""
    cut = 1 - draw_shares(Augment(cutmix=1.0), 4000)
    torch.manual_seed(0)
    half = torch.rand(4000, 1).sqrt() / 2
    centre = torch.rand(4000, 2)
    expected = ((centre + half).clamp(max=1) - (centre - half).clamp(min=0)).prod(dim=1)
    assert cut.mean() == pytest.approx(expected.mean().item(), abs=0.015)
    assert cut.std() == pytest.approx(expected.std().item(), abs=0.015)


def test_each_image_gets_one_of_both() -> None:
    augment = Augment(mixup=0.2, cutmix=1.0, mix_share=0.6)
    params = draw_params(augment, 10_000, 0, 0)
    has_mixup, has_cutmix = params[:, 6] < 1, params[:, 9:11].prod(dim=1) > 0
    assert not (has_mixup & has_cutmix).any()
    assert 0.58 < (has_mixup | has_cutmix).float().mean() < 0.62
    assert 0.28 < has_cutmix.float().mean() < 0.32


def test_an_image_alone_is_mixed_with_itself(images: torch.Tensor) -> None:
    augment = Augment(mixup=1.0, cutmix=1.0)
    mixed, _ = mix_batch(augment, images[:1], draw_params(augment, 50, 0, 0)[:1])
    assert torch.allclose(mixed, images[:1].float(), atol=1e-3)
