"""Moved pixels against the same thing written image by image, and against torchvision."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional

from trainer.data.augment import augment_batch, draw_crops, draw_params
from trainer.data.augment.geometry import crop_and_resize
from trainer.recipes import Augment


def test_crops_equal_torchvisions_without_antialiasing(photos: torch.Tensor) -> None:
    height, width = photos.shape[2:]
    boxes = draw_crops(Augment(crop_area=0.1), torch.tensor([height, width]).expand(6, 2), seed=0, epoch=0)
    out = crop_and_resize(photos.float(), boxes)
    pixels = (boxes * torch.tensor([height, width, height, width])).round().int()
    for image, mine, (top, left, h, w) in zip(photos, out, pixels.tolist(), strict=True):
        expected = functional.resized_crop(image, top, left, h, w, [height, width], antialias=False)
        assert (mine - expected).abs().max() <= 0.51


def test_the_crop_of_everything_changes_nothing(photos: torch.Tensor) -> None:
    out = crop_and_resize(photos.float(), torch.tensor([0.0, 0, 1, 1]).expand(6, 4))
    assert torch.allclose(out, photos.float(), atol=1e-2)


@pytest.mark.parametrize("vertical", ["none", "random"])
@pytest.mark.parametrize("fill", ["reflect", "zero", "edge"])
def test_shift_and_flip_equal_pad_crop_flip(images: torch.Tensor, fill: str, vertical: str) -> None:
    augment = Augment(flip="alternating", flip_vertical=vertical, shift=2, fill=fill)  # type: ignore[arg-type]
    augment_params = draw_params(augment, 50, seed=1, epoch=0)
    indices = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    out = augment_batch(augment, images, indices, augment_params[indices])
    for image, index in zip(out, indices.tolist(), strict=True):
        mirrored, dx, dy = augment_params[index, :3].tolist()
        upside_down = vertical == "random" and augment_params[index, 6] > 0
        mode = {"reflect": {"mode": "reflect"}, "zero": {"value": 0.0}, "edge": {"mode": "replicate"}}[fill]
        source = images[index].float()
        source = source.flip(-1) if mirrored else source
        source = source.flip(-2) if upside_down else source
        padded = F.pad(source, (2, 2, 2, 2), **mode)  # type: ignore[arg-type]
        right, down = -int(dx) if mirrored else int(dx), -int(dy) if upside_down else int(dy)
        assert torch.equal(image.float(), padded[:, 2 + down : 14 + down, 2 + right : 14 + right])


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_flips_alone(images: torch.Tensor, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU flips the chosen images only; other devices flip all and select."""
    if device == "other":
        monkeypatch.setattr(
            "trainer.data.augment.geometry.apply_where",
            lambda chosen, batch, flip: torch.where(chosen[:, None, None, None], flip(batch), batch),
        )
    augment = Augment(flip="random", flip_vertical="random")
    params = draw_params(augment, 50, 0, 0)
    out = augment_batch(augment, images, torch.arange(50), params)
    assert out.dtype == torch.uint8
    for image, source, mirrored, upside_down in zip(out, images, params[:, 0], params[:, 6], strict=True):
        axes = [axis for axis, is_flipped in ((-1, mirrored), (-2, upside_down)) if is_flipped]
        assert torch.equal(image, source.flip(axes))


def test_affine_without_numbers_is_the_identity(images: torch.Tensor) -> None:
    augment = Augment(rotate_degrees=10, scale=0.1)
    still = torch.tensor([[0.0, 0, 0, 0, 1, 1]])
    out = augment_batch(augment, images, torch.tensor([3]), still)
    assert torch.allclose(out[0], images[3].float(), atol=1e-2)


@pytest.mark.parametrize("upside_down", [0.0, 1.0])
def test_affine_flips_and_shifts_as_the_integer_path_does(images: torch.Tensor, upside_down: float) -> None:
    plain = Augment(shift=2, fill="zero", flip="alternating", flip_vertical="random")
    affine = Augment(rotate_degrees=1, shift=2, fill="zero", flip_vertical="random")
    augment_params = torch.tensor([[1.0, 1, -2, 0, 1, 1, upside_down]])
    expected = augment_batch(plain, images, torch.tensor([5]), augment_params).float()
    assert torch.allclose(augment_batch(affine, images, torch.tensor([5]), augment_params), expected, atol=1e-2)


def test_the_edge_is_continued() -> None:
    """Objects on a white ground stay on a white ground, without black corners."""
    augment = Augment(shift=2, rotate_degrees=60, scale=0.5, fill="edge")
    images = torch.full((1, 3, 24, 24), 255, dtype=torch.uint8)
    images[:, :, 10:14, 10:14] = 0
    indices = torch.zeros(40, dtype=torch.int64)
    out = augment_batch(augment, images, indices, draw_params(augment, 40, seed=0, epoch=0)).float()
    assert (out[:, :, [0, -1]] > 254).all()
    assert (out[:, :, :, [0, -1]] > 254).all()
    assert len(out.flatten(1).unique(dim=0)) == 40


def test_rotation_is_torchvisions(photos: torch.Tensor) -> None:
    """About the centre; the sign does not matter, as both directions are drawn."""
    square = photos[:, :, :, 2:22]
    params = torch.tensor([[0.0, 0, 0, 0.3, 1, 1]]).expand(6, 6)
    out = augment_batch(Augment(rotate_degrees=30), square, torch.arange(6), params)
    expected = functional.rotate(square, float(torch.rad2deg(torch.tensor(0.3))), functional.InterpolationMode.BILINEAR)
    assert (out - expected).abs().max() <= 0.52
