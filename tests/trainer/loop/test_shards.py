"""The shards of a batch, and the order in which they are summed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.loop.batch_norm import BatchNormSums
from trainer.loop.shards import ShardSums, share_of, sum_in_tree


@given(num_images=st.integers(1, 300), depth=st.integers(0, 4), data=st.data())
def test_shards_do_not_depend_on_the_number_of_ranks(num_images: int, depth: int, data: st.DataObject) -> None:
    num_shards = 2**depth
    world_size = 2 ** data.draw(st.integers(0, depth))
    alone = share_of(num_images, 0, 1, num_shards)
    shares = [share_of(num_images, rank, world_size, num_shards) for rank in range(world_size)]
    assert tuple(size for share in shares for size in share.sizes) == alone.sizes
    assert [i for share in shares for i in range(num_images)[share.part]] == list(range(num_images))
    assert max(alone.sizes) - min(alone.sizes) <= 1


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_ranks_sums_are_subtrees_of_one_tree(num_ranks: int) -> None:
    """The numbers differ so much in size that another order of adding gives other bits."""
    torch.manual_seed(0)
    leaves = torch.randn(8, 1000) * torch.logspace(0, 6, 8)[:, None]
    whole = sum_in_tree(lambda shard: leaves[shard].clone(), 8)
    part = 8 // num_ranks
    ranks = [sum_in_tree(lambda shard: leaves[shard].clone(), part, first) for first in range(0, 8, part)]
    while len(ranks) > 1:
        ranks = [a + b for a, b in zip(ranks[::2], ranks[1::2], strict=True)]
    assert torch.equal(ranks[0], whole)
    assert not torch.equal(leaves.sum(dim=0), whole)


def test_unpack_restores_the_collected_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model.to(memory_format=torch.channels_last)
    sums = ShardSums(model, BatchNormSums(model))
    images = torch.randn(5, 3, 4, 4)
    model(images).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    norms = BatchNormSums(model)
    sums = ShardSums(model, norms)
    with norms.collecting():
        vector = sums.collect(torch.tensor([3.0, 2.0]), 5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sums.unpack(vector, 5).tolist() == [3, 2]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
        assert parameter.grad.stride() == parameter.stride()


def test_the_gradients_of_the_only_shard_are_kept_as_they_are() -> None:
    model = nn.ModuleDict({"used": nn.Conv2d(1, 4, 3), "unused": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model.to(memory_format=torch.channels_last)
    sums = ShardSums(model, BatchNormSums(model))
    model["frozen"].requires_grad_(False)
    weight = model["used"].weight
    gradient = torch.randn(4, 1, 3, 3)
    weight.grad = gradient
    sums.complete()
    assert weight.grad.data_ptr() == gradient.data_ptr()
    assert torch.equal(weight.grad, gradient)
    assert weight.grad.stride() == weight.stride() != gradient.stride()  # they differ where a size is 1
    assert torch.equal(model["unused"].weight.grad, torch.zeros(2, 2))
    assert model["frozen"].weight.grad is None
