"""Colours against torchvision's operations on uint8 images, which round to whole levels after each."""

from collections.abc import Callable

import pytest
import torch
from torchvision.transforms import functional

from trainer.data.augment import colour
from trainer.recipes import Augment

STRENGTHS = {
    "adjust_brightness": [0.0, 0.3, 0.8, 1.0, 1.4, 1.99],
    "adjust_contrast": [0.0, 0.3, 0.8, 1.0, 1.4, 1.99],
    "adjust_saturation": [0.0, 0.3, 0.8, 1.0, 1.4, 1.99],
    "adjust_hue": [-0.5, -0.2, -0.05, 0.0, 0.1, 0.35],
    "adjust_sharpness": [0.0, 0.3, 0.8, 1.0, 1.4, 1.99],
    "posterize": [2, 3, 4, 5, 7, 8],
    "solarize": [0.0, 51.0, 127.5, 128.0, 204.0, 255.0],
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_image_is_changed_as_torchvision_changes_it(name: str, photos: torch.Tensor) -> None:
    mine: Callable[..., torch.Tensor] = getattr(colour, name)
    before = photos.clone().float()
    out = mine(before, torch.tensor(STRENGTHS[name], dtype=torch.float32))
    assert torch.equal(before, photos.float())  # operations leave their argument alone
    for image, changed, strength in zip(photos, out, STRENGTHS[name], strict=True):
        expected = getattr(functional, name)(image, strength)
        assert (changed - expected).abs().max() <= (1e-3 if name in ("posterize", "solarize") else 2)


def test_autocontrast_is_torchvisions(photos: torch.Tensor) -> None:
    photos = torch.cat([photos, torch.full_like(photos[:1], 77)])
    out = colour.autocontrast(photos.float())
    assert (out - functional.autocontrast(photos)).abs().max() <= 1


def test_equalize_is_torchvisions(photos: torch.Tensor) -> None:
    """Also for images with one level, and with so few pixels that nothing changes."""
    photos = torch.cat([photos, torch.full_like(photos[:1], 77), torch.full_like(photos[:1], 0)])
    assert torch.equal(colour.equalize(photos.float()), functional.equalize(photos).float())
    tiny = photos[:, :, :4, :4]
    assert torch.equal(colour.equalize(tiny.float()), functional.equalize(tiny).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e30])
def test_equalize_takes_memory_that_holds_no_image(value: float) -> None:
    """As in `loop.rehearsal`; on a GPU an error of this kind would be one of all that follows."""
    assert colour.equalize(torch.full((1, 3, 4, 4), value)).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("operation", [colour.adjust_saturation, colour.adjust_hue])
def test_grey_images_have_no_saturation_and_no_hue(operation: Callable[..., torch.Tensor]) -> None:
    grey = torch.arange(256.0).view(1, 1, 16, 16)
    assert torch.equal(operation(grey, torch.tensor([0.3])), grey)
    in_colour = grey.expand(1, 3, 16, 16).contiguous()
    assert torch.allclose(operation(in_colour, torch.tensor([0.3])), in_colour, atol=0.05)


def test_jitter_applies_what_the_recipe_asks_for(photos: torch.Tensor) -> None:
    params = torch.tensor([0.8, 1.2, 0.5, 0.1]).expand(6, 4)
    out = colour.jitter(Augment(brightness=0.4, hue=0.1), photos.float(), params)
    expected = colour.adjust_hue(colour.adjust_brightness(photos.float(), params[:, 0]), params[:, 3])
    assert torch.equal(out, expected)
