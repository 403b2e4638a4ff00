"""Augmentation against the same thing written image by image."""

import pytest
import torch
import torch.nn.functional as F

from trainer.data.augment import augment_batch, check_shift, draw_params
from trainer.errors import ConfigError
from trainer.recipes import Augment


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_nothing_to_do_leaves_the_pixels_alone(images: torch.Tensor) -> None:
    indices = torch.tensor([4, 2, 9])
    out = augment_batch(Augment(), images, indices, draw_params(Augment(), 50, 0, 0)[indices])
    assert out.dtype == torch.uint8
    assert torch.equal(out, images[indices])


@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_shift_and_mirror_equal_pad_crop_flip(images: torch.Tensor, fill: str) -> None:
    augment = Augment(flip="alternating", shift=2, fill=fill)  # type: ignore[arg-type]
    augment_params = draw_params(augment, 50, seed=1, epoch=0)
    indices = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    out = augment_batch(augment, images, indices, augment_params[indices])
    for image, index in zip(out, indices.tolist(), strict=True):
        mirrored, dx, dy = augment_params[index, :3].tolist()
        mode = {"mode": "reflect"} if fill == "reflect" else {"value": 0.0}
        source = images[index].float().flip(-1) if mirrored else images[index].float()
        padded = F.pad(source, (2, 2, 2, 2), **mode)  # type: ignore[arg-type]
        shift = -int(dx) if mirrored else int(dx)
        crop = padded[:, 2 + int(dy) : 14 + int(dy), 2 + shift : 14 + shift]
        assert torch.equal(image.float(), crop)


def test_images_are_not_shifted_out_of_themselves() -> None:
    check_shift(Augment(shift=7), 8)
    with pytest.raises(ConfigError, match="images of 8 pixels cannot be shifted by 8"):
        check_shift(Augment(shift=8), 8)


def test_shifts_cover_their_range_evenly() -> None:
    augment_params = draw_params(Augment(shift=2), 100_000, seed=0, epoch=0)
    for column in (1, 2):
        counts = torch.bincount((augment_params[:, column] + 2).long(), minlength=5)
        assert len(counts) == 5
        assert ((counts - 20_000).abs() < 600).all()


def test_alternating_flip_shows_every_image_both_ways_in_two_epochs() -> None:
    augment = Augment(flip="alternating")
    first, second, third = (draw_params(augment, 1000, seed=3, epoch=epoch)[:, 0] for epoch in range(3))
    assert torch.equal(first + second, torch.ones(1000))
    assert torch.equal(first, third)
    assert 400 < first.sum() < 600


def test_a_sample_is_augmented_the_same_in_every_batch(images: torch.Tensor) -> None:
    augment = Augment(flip="alternating", shift=2, rotate_degrees=10, scale=0.1)
    augment_params = draw_params(augment, 50, seed=0, epoch=1)
    alone = augment_batch(augment, images, torch.tensor([7]), augment_params[[7]])
    among = augment_batch(augment, images, torch.arange(50), augment_params)
    assert torch.allclose(alone[0], among[7], atol=1e-3)


def test_affine_without_numbers_is_the_identity(images: torch.Tensor) -> None:
    augment = Augment(rotate_degrees=10, scale=0.1)
    still = torch.tensor([[0.0, 0, 0, 0, 1, 1]])
    out = augment_batch(augment, images, torch.tensor([3]), still)
    assert torch.allclose(out[0], images[3].float(), atol=1e-2)


def test_affine_mirrors_and_shifts_as_the_integer_path_does(images: torch.Tensor) -> None:
    affine, plain = Augment(rotate_degrees=1, shift=2, fill="zero"), Augment(shift=2, fill="zero", flip="alternating")
    augment_params = torch.tensor([[1.0, 1, -2, 0, 1, 1]])
    expected = augment_batch(plain, images, torch.tensor([5]), augment_params).float()
    assert torch.allclose(augment_batch(affine, images, torch.tensor([5]), augment_params), expected, atol=1e-2)
