"""Random rectangles against torchvision's, image by image."""

import math

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from trainer.data.augment import draw_crops
from trainer.data.augment.boxes import NUM_TRIES, draw_boxes, inside
from trainer.data.order import generator
from trainer.recipes import Augment

IMAGENET = Augment(crop_area=0.08)


def draw_one(height: int, width: int, uniform: list[list[float]]) -> tuple[int, int, int, int] | None:
    """torchvision's `get_params`, with the same random numbers."""
    for share, log_ratio in uniform[:-1]:
        area = height * width * (0.08 + (1 - 0.08) * share)
        ratio = math.exp((2 * log_ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            down, across = uniform[-1]
            return int(down * (height - h + 1)), int(across * (width - w + 1)), h, w
    return None


def test_crops_are_torchvisions() -> None:
    sizes = torch.randint(20, 500, (300, 2), generator=torch.Generator().manual_seed(0))
    boxes = draw_crops(IMAGENET, sizes, seed=4, epoch=2) * sizes[:, [0, 1, 0, 1]]
    assert (boxes - boxes.round()).abs().max() < 1e-3
    uniform = torch.rand(300, NUM_TRIES + 1, 2, generator=generator("crop", 4, 2)).tolist()
    expected = [draw_one(*size, numbers) for size, numbers in zip(sizes.tolist(), uniform, strict=True)]
    found = [tuple(box) for box in boxes.round().int().tolist()]
    pairs = [(mine, theirs) for mine, theirs in zip(found, expected, strict=True) if theirs is not None]
    assert len(pairs) > 250
    assert sum(mine != theirs for mine, theirs in pairs) <= 2  # rounded to the pixel beside
    assert len(set(found)) > 290


def test_crops_have_torchvisions_distribution() -> None:
    mine = draw_crops(IMAGENET, torch.tensor([100, 130]).expand(2000, 2), seed=0, epoch=0)
    image = torch.zeros(3, 100, 130)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    theirs = theirs / torch.tensor([100, 130, 100, 130])
    for statistic in (lambda box: box, lambda box: box[:, 2:].prod(dim=1), lambda box: (box[:, 2] / box[:, 3]).log()):
        a, b = statistic(mine), statistic(theirs)
        assert torch.allclose(a.mean(dim=0), b.mean(dim=0), atol=0.03)
        assert torch.allclose(a.std(dim=0), b.std(dim=0), atol=0.03)


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10)), ((1, 1), (0, 0, 1, 1))]
)
def test_without_a_crop_that_fits_the_centre_is_taken(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    sizes = torch.tensor([size])
    box = draw_crops(Augment(crop_area=0.9), sizes, seed=0, epoch=0) * sizes[:, [0, 1, 0, 1]]
    assert tuple(box[0].round().int().tolist()) == expected


def test_the_whole_centre_without_random_crops() -> None:
    sizes = torch.tensor([[100, 200], [300, 100], [50, 50]])
    boxes = draw_crops(Augment(), sizes, seed=0, epoch=0) * sizes[:, [0, 1, 0, 1]]
    assert boxes.round().int().tolist() == [[0, 50, 100, 100], [100, 0, 100, 100], [0, 0, 50, 50]]


def test_many_crops_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of millions of images needs little memory, and the parts do not change what is drawn."""
    sizes = torch.randint(20, 500, (70, 2), generator=torch.Generator().manual_seed(0))
    whole = draw_crops(IMAGENET, sizes, seed=0, epoch=0)
    monkeypatch.setattr("trainer.data.augment.boxes._CHUNK", 32)
    assert torch.equal(draw_crops(IMAGENET, sizes, seed=0, epoch=0), whole)


def test_areas_and_ratios_stay_in_their_limits() -> None:
    sizes = torch.tensor([1024, 1024]).expand(5000, 2)
    boxes, fits = draw_boxes(sizes, (0.02, 1 / 3), 10 / 3, generator("test", 0))
    assert fits.all()
    area = boxes[:, 2:].prod(dim=1) / 1024**2
    ratio = (boxes[:, 2] / boxes[:, 3]).log().exp()
    assert 0.019 < area.min() < 0.03
    assert 0.32 < area.max() < 0.335
    assert 0.29 < ratio.min() < 0.35
    assert 3 < ratio.max() < 3.4
    assert ((boxes[:, :2] >= 0) & (boxes[:, :2] + boxes[:, 2:] <= 1024)).all()


def test_pixels_inside_of_a_rectangle() -> None:
    mask = inside(torch.tensor([[0.25, 0.5, 0.5, 0.5], [0, 0, 0, 0]]), 4, 6)
    expected = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    expected[0, 0, 1:3, 3:6] = True
    assert torch.equal(mask, expected)
