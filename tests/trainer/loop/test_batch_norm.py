"""Running statistics from sums over shards."""

import torch
from torch import nn

from trainer.loop.batch_norm import BatchNormSums


def step(model: nn.Module, shards: list[torch.Tensor]) -> None:
    norms = BatchNormSums(model)
    total = torch.zeros(norms.length)
    with norms.collecting():
        for shard in shards:
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
