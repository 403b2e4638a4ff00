"""Running statistics from sums over shards."""

import pytest
import torch
from torch import nn

from trainer.loop.batch_norm import BatchNormSums, has_single_values


def step(model: nn.Module, shards: list[torch.Tensor]) -> None:
    norms = BatchNormSums(model)
    total = torch.zeros(norms.length)
    with norms.collecting():
        for shard in shards:
            with norms.forward_pass(len(shard)):
                model(shard)
            sums = torch.zeros(norms.length)
            norms.write(sums, len(shard))
            total += sums
    norms.update(total, sum(map(len, shards)))


def test_a_single_shard_gives_what_batch_norm_itself_does() -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Sequential(nn.BatchNorm2d(3, momentum=0.4), nn.BatchNorm2d(3)) for _ in range(2))
    for _ in range(3):
        images = torch.randn(10, 3, 4, 4) * 5 + 100
        theirs(images)
        step(mine, [images])
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5), (a, b)


def test_shards_are_weighted_by_their_images_and_their_means_add_to_the_variance() -> None:
    norm = nn.BatchNorm1d(1, momentum=1.0)
    torch.manual_seed(0)
    images = torch.randn(100_000, 1) + torch.arange(4).repeat_interleave(25_000)[:, None] * 3
    step(norm, list(images.split([10_000, 30_000, 60_000])))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, images.mean(dim=0), rtol=1e-4)
    assert torch.allclose(norm.running_var, images.var(dim=0), rtol=1e-3)
    assert norm.num_batches_tracked == 1
    assert norm.momentum == 1.0


def test_a_failed_pass_leaves_the_norm_unchanged() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.3)
    norms = BatchNormSums(norm)
    before = [buffer.clone() for buffer in norm.buffers()]
    try:
        with norms.collecting():
            norm(torch.randn(5, 2))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))
    assert norm.momentum == 0.3


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (1, 3), (1, 1, 2)])
def test_a_shard_with_one_value_per_channel_uses_and_keeps_the_running_statistics(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2, momentum=1.0)
    step(norm, [torch.randn(50, 2, 1, 1) + 3])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    shards = [torch.randn(size, 2, 1, 1) for size in sizes]
    norms, outputs = BatchNormSums(norm), []
    total, weight = torch.zeros(norms.length), sum(sizes)
    with norms.collecting():
        for shard in shards:
            with norms.forward_pass(len(shard)):
                outputs.append(norm(shard))
            sums = torch.zeros(norms.length)
            norms.write(sums, len(shard))
            total += sums
    norms.update(total, weight)
    expected = (shards[sizes.index(1)] - mean.view(1, 2, 1, 1)) / (variance.view(1, 2, 1, 1) + norm.eps).sqrt()
    assert torch.allclose(outputs[sizes.index(1)], expected, rtol=1e-5)
    means = torch.stack([mean if len(shard) == 1 else shard.mean(dim=(0, 2, 3)) for shard in shards])
    assert torch.allclose(norm.running_mean, (means * torch.tensor(sizes)[:, None]).sum(dim=0) / weight, atol=1e-6)
    assert norm.running_var.isfinite().all()
    assert norm.training


def test_one_image_with_several_pixels_has_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    mine, theirs = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    image = torch.randn(1, 2, 3, 3)
    theirs(image)
    step(mine, [image])
    assert mine.running_mean is not None
    assert torch.allclose(mine.running_mean, theirs.running_mean, rtol=1e-5)


def test_networks_that_normalise_single_values_are_recognised() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    spatial = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    images = torch.randn(2, 3, 2, 2)
    assert [has_single_values(network, images) for network in (flat, spatial)] == [True, False]
    assert flat.training
