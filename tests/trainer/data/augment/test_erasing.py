"""Random erasing."""

import pytest
import torch
from torchvision.transforms import functional

from trainer.data.augment import augment_batch, draw_params
from trainer.data.augment.erasing import draw_erased, erase
from trainer.recipes import Augment


def test_the_share_and_the_size_of_what_is_erased() -> None:
    boxes = draw_erased(Augment(erase=0.25, erase_area=0.2), 10_000, seed=0, epoch=0)
    area = boxes[:, 2:].prod(dim=1)
    is_erased = area > 0
    assert 0.24 < is_erased.float().mean() < 0.26
    assert (boxes[~is_erased] == 0).all()
    assert 0.019 < area[is_erased].min() < 0.025
    assert 0.19 < area.max() < 0.201
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_rectangle_gets_the_mean_colour(photos: torch.Tensor, dtype: torch.dtype) -> None:
    boxes = draw_erased(Augment(erase=0.7), 6, seed=1, epoch=0)
    out = erase(photos.to(dtype, copy=True), boxes)
    assert out.dtype == dtype
    edges = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    edges = (edges * torch.tensor([20, 24, 20, 24])).round().int()
    num_erased = 0
    for image, erased, (top, left, bottom, right) in zip(photos, out, edges.tolist(), strict=True):
        mean = image.float().mean(dim=(1, 2), keepdim=True)
        expected = functional.erase(image.float(), top, left, bottom - top, right - left, mean)
        assert (erased - expected).abs().max() <= 0.5
        num_erased += not torch.equal(erased.float(), image.float())
    assert 2 <= num_erased < 6


def test_uint8_images_stay_uint8(images: torch.Tensor) -> None:
    """So that erasing costs no conversion where nothing else needs one."""
    augment = Augment(flip="random", erase=0.5)
    assert augment_batch(augment, images, torch.arange(50), draw_params(augment, 50, 0, 0)).dtype == torch.uint8
