"""TrivialAugment against torchvision's."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from trainer.data.augment.trivial import OPERATIONS, apply_trivial, draw_trivial
from trainer.recipes import Augment

THEIR_NAMES = {
    "identity": "Identity",
    "shear x": "ShearX",
    "shear y": "ShearY",
    "translate x": "TranslateX",
    "translate y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return draw_trivial(Augment(policy="trivial"), 20_000, seed=0, epoch=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_strengths_are_torchvisions(name: str, drawn: torch.Tensor) -> None:
    operation, strength = drawn.unbind(1)
    is_it = operation == OPERATIONS.index(name)
    assert 20_000 / 14 * 0.85 < is_it.sum() < 20_000 / 14 * 1.15
    magnitudes, is_signed = TrivialAugmentWide()._augmentation_space(31)[THEIR_NAMES[name]]
    expected = magnitudes.float().view(-1)
    if is_signed:
        expected = torch.cat([expected, -expected])
    if name.startswith("translate"):
        expected = expected.int().float()
    if name in ("brightness", "saturation", "contrast", "sharpness"):
        expected = 1 + expected
    found, expected = strength[is_it].unique(), expected.unique()
    assert len(found) == len(expected)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str, drawn: torch.Tensor, photos: torch.Tensor) -> None:
    """Within two levels, as torchvision rounds; and the other images of the batch stay as they are."""
    rows = drawn[drawn[:, 0] == OPERATIONS.index(name)][:3]
    params = torch.cat([rows, torch.zeros(3, 2)])
    out = apply_trivial(photos.float(), params)
    assert torch.equal(out[3:], photos[3:].float())
    for image, changed, (_, strength) in zip(photos, out, rows.tolist(), strict=False):
        is_factor = name in ("brightness", "saturation", "contrast", "sharpness")
        magnitude = strength - 1 if is_factor else strength
        expected = _apply_op(image, THEIR_NAMES[name], magnitude, InterpolationMode.BILINEAR, None)
        assert (changed - expected).abs().max() <= 2, strength


def test_the_edge_is_continued(drawn: torch.Tensor) -> None:
    moves = drawn[(drawn[:, 0] > 0) & (drawn[:, 0] <= OPERATIONS.index("rotate"))][:200]
    white = torch.full((200, 3, 64, 64), 255.0)
    assert (apply_trivial(white.clone(), moves, "edge") > 254.9).all()
    assert (apply_trivial(white.clone(), moves).amin(dim=(1, 2, 3)) == 0).sum() > 150


def test_all_images_at_once_and_the_chosen_ones_alone_are_the_same(
    drawn: torch.Tensor, photos: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes every operation for every image and selects, as it may not wait for the number of images."""
    indices = torch.arange(56) % len(photos)
    chosen_alone = apply_trivial(photos[indices].float(), drawn[:56])
    monkeypatch.setattr(
        "trainer.data.augment.trivial.apply_where",
        lambda chosen, batch, operation, *params: torch.where(
            chosen[:, None, None, None], operation(batch, *params), batch
        ),
    )
    assert torch.allclose(apply_trivial(photos[indices].float(), drawn[:56]), chosen_alone, atol=1e-3)
    assert math.isfinite(chosen_alone.sum())
