"""The parameters of an epoch, and the operations one after another."""

import hashlib
from dataclasses import replace

import pytest
import torch

from tests.trainer.single_device import SingleDeviceMode
from trainer.data.augment import augment_batch, draw_params, mix_batch
from trainer.recipes import Augment

EVERYTHING = Augment(
    crop_area=0.3,
    flip="random",
    flip_vertical="random",
    shift=2,
    rotate_degrees=10,
    scale=0.1,
    policy="trivial",
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    erase=0.5,
    mixup=0.2,
    cutmix=1.0,
)
ALONE = {
    "crop": Augment(crop_area=0.3),
    "flip": Augment(flip="random"),
    "flip vertical": Augment(flip_vertical="random"),
    "both flips and a shift": Augment(flip="alternating", flip_vertical="random", shift=2),
    "trivial": Augment(policy="trivial"),
    "jitter": Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "erase": Augment(erase=0.5),
    "mixup": Augment(mixup=0.2),
    "cutmix": Augment(cutmix=1.0),
    "everything": EVERYTHING,
}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("augment", "epoch", "expected"),
    [
        (Augment(flip="alternating", shift=2), 0, "46feb78db280a7a6"),
        (Augment(flip="alternating", shift=2), 3, "0dc107020e0b41ec"),
        (Augment(shift=2, rotate_degrees=10, scale=0.1), 0, "231a1b9d1ef5471c"),
    ],
)
def test_the_parameters_of_version_0_1_are_the_same(augment: Augment, epoch: int, expected: str) -> None:
    """Runs of older versions go on with the same weights."""
    assert digest(draw_params(augment, 1000, seed=7, epoch=epoch)) == expected


def test_nothing_to_do_leaves_the_pixels_alone(images: torch.Tensor) -> None:
    indices = torch.tensor([4, 2, 9])
    out = augment_batch(Augment(), images, indices, draw_params(Augment(), 50, 0, 0)[indices])
    assert out.dtype == torch.uint8
    assert torch.equal(out, images[indices])


def test_an_operation_draws_the_same_with_others_and_without() -> None:
    """Each has a generator of its own."""
    everything = draw_params(EVERYTHING, 100, 1, 2)
    for augment in (Augment(erase=0.5), Augment(policy="trivial")):
        columns = draw_params(augment, 100, 1, 2)[:, 6:]
        assert any(torch.equal(columns, part) for part in everything.unfold(1, columns.size(1), 1).unbind(1)) or any(
            torch.equal(columns, everything[:, start : start + columns.size(1)]) for start in range(everything.size(1))
        )


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_sample_is_augmented_the_same_in_every_batch(name: str, num_channels: int, images: torch.Tensor) -> None:
    """And differently in another epoch. The images of the set are not changed."""
    augment, images = ALONE[name], images[:, :num_channels].contiguous()
    before = images.clone()
    params, later = (draw_params(augment, 50, seed=0, epoch=epoch, image_size=(12, 12)) for epoch in (1, 2))
    assert len(params) == 50
    assert not torch.equal(params, later)
    among = augment_batch(augment, images, torch.arange(50), params)
    assert among.shape == images.shape
    assert 0 <= among.min() <= among.max() <= 255
    for start in (0, 7, 49):
        alone = augment_batch(augment, images, torch.tensor([start]), params[[start]])
        assert torch.allclose(alone[0].float(), among[start].float(), atol=1e-2)
    assert torch.equal(images, before)
    if name not in ("mixup", "cutmix"):
        assert not torch.equal(among.float(), images.float())


@pytest.mark.parametrize("name", sorted(ALONE))
def test_the_order_of_the_bytes_changes_nothing(name: str, images: torch.Tensor) -> None:
    """Streamed batches have a pixel's channels side by side; the network's convolutions must not see that."""
    batch = images[:16]
    streamed = batch.contiguous(memory_format=torch.channels_last)
    params, own = draw_params(ALONE[name], 16, 0, 0), torch.arange(16)
    expected, found = (augment_batch(ALONE[name], each, own, params) for each in (batch, streamed))
    assert torch.equal(expected, found)
    assert found.is_contiguous()


def test_columns_are_those_of_the_operations_in_use() -> None:
    assert draw_params(Augment(), 3, 0, 0).shape == (3, 6)
    assert draw_params(Augment(crop_area=0.5), 3, 0, 0).shape == (3, 6)
    assert draw_params(Augment(crop_area=0.5), 3, 0, 0, image_size=(8, 8)).shape == (3, 10)
    without_mixing = draw_params(replace(EVERYTHING, mix_share=0.0), 3, 0, 0)
    assert without_mixing.size(1) == draw_params(EVERYTHING, 3, 0, 0).size(1) - 5


def test_alternating_flip_shows_every_image_both_ways_in_two_epochs() -> None:
    augment = Augment(flip="alternating")
    first, second, third = (draw_params(augment, 1000, seed=3, epoch=epoch)[:, 0] for epoch in range(3))
    assert torch.equal(first + second, torch.ones(1000))
    assert torch.equal(first, third)
    assert 400 < first.sum() < 600


def test_random_flips_are_drawn_anew_in_each_epoch() -> None:
    augment = Augment(flip="random", flip_vertical="random")
    first, second = (draw_params(augment, 1000, seed=3, epoch=epoch)[:, [0, 6]] for epoch in range(2))
    for columns in (first, second, first * second, first[:, :1] * first[:, 1:]):
        assert columns.unique().tolist() == [0, 1]
    assert 400 < first.sum(dim=0).min() <= first.sum(dim=0).max() < 600
    assert (first != second).sum(dim=0).min() > 400


def test_shifts_cover_their_range_evenly() -> None:
    augment_params = draw_params(Augment(shift=2), 100_000, seed=0, epoch=0)
    for column in (1, 2):
        counts = torch.bincount((augment_params[:, column] + 2).long(), minlength=5)
        assert len(counts) == 5
        assert ((counts - 20_000).abs() < 600).all()


def test_strengths_of_colours_cover_their_range() -> None:
    params = draw_params(Augment(brightness=0.4, hue=0.1), 10_000, 0, 0)[:, 6:]
    brightness, contrast, saturation, hue = params.unbind(1)
    assert brightness.min() == pytest.approx(0.6, abs=0.01)
    assert brightness.max() == pytest.approx(1.4, abs=0.01)
    assert contrast.unique().tolist() == saturation.unique().tolist() == [1]
    assert hue.abs().max() == pytest.approx(0.1, abs=0.001)


def test_mixing_comes_last(images: torch.Tensor) -> None:
    """The partner is the augmented image at the same place in the reverse order."""
    params = draw_params(EVERYTHING, 50, 0, 0, image_size=(12, 12))
    augmented = augment_batch(EVERYTHING, images, torch.arange(50), params)
    mixed, share = mix_batch(EVERYTHING, augmented, params)
    assert mixed.shape == augmented.shape
    lowest, highest = torch.minimum(augmented, augmented.flip(0)), torch.maximum(augmented, augmented.flip(0))
    assert ((mixed >= lowest - 1e-3) & (mixed <= highest + 1e-3)).all()
    assert ((share >= 0) & (share <= 1)).all()
    assert share.std() > 0.1


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_cuda_graph_can_hold_every_operation(num_channels: int) -> None:
    """None waits for a value, chooses a shape by one, or touches another device."""
    device = torch.device("meta")
    images = torch.zeros(10, num_channels, 32, 32, dtype=torch.uint8, device=device)
    indices = torch.zeros(4, dtype=torch.int64, device=device)
    for augment in ALONE.values():
        params = draw_params(augment, 4, 0, 0, image_size=(32, 32)).to(device)
        with SingleDeviceMode(device) as watch:
            batch = augment_batch(augment, images, indices, params)
            if augment.mixes:
                batch, _ = mix_batch(augment, batch, params)
        assert batch.shape == (4, num_channels, 32, 32)
        assert watch.num_operations > 3
