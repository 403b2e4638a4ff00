"""Every sample once an epoch, whatever the batch and the number of ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import balanced_order, epoch_order, generator, num_steps_per_epoch, rank_share

sizes = st.integers(min_value=1, max_value=500)
worlds = st.integers(min_value=1, max_value=17)
seeds = st.integers(min_value=0, max_value=2**63 - 1)


@given(num_samples=sizes, batch_size=st.integers(min_value=1, max_value=120), world_size=worlds, seed=seeds)
def test_each_sample_is_visited_once_an_epoch(num_samples: int, batch_size: int, world_size: int, seed: int) -> None:
    order = epoch_order(num_samples, seed, epoch=3)
    seen = []
    for step in range(num_steps_per_epoch(num_samples, batch_size)):
        batch = order[step * batch_size : (step + 1) * batch_size]
        assert len(batch) > 0
        for rank in range(world_size):
            seen += batch[rank_share(len(batch), rank, world_size)].tolist()
    assert sorted(seen) == list(range(num_samples))


@settings(deadline=None)
@given(counts=st.lists(st.integers(min_value=0, max_value=90), min_size=1, max_size=7).filter(any), seed=seeds)
def test_a_balanced_order_gives_each_class_the_same_share(counts: list[int], seed: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = balanced_order(labels, seed, epoch=3)
    assert len(order) == len(labels)
    by_class = torch.bincount(labels[order], minlength=len(counts))[torch.tensor(counts) > 0]
    assert by_class.max() - by_class.min() <= 1
    for label in range(len(counts)):  # all samples of a class come equally often, up to one time
        times = torch.bincount(order, minlength=len(labels))[labels == label]
        assert len(times) == 0 or times.max() - times.min() <= 1
    torch.manual_seed(0)
    assert torch.equal(order, balanced_order(labels, seed, epoch=3))


@given(num_samples=sizes, world_size=worlds)
def test_shares_are_in_order_and_differ_by_at_most_one(num_samples: int, world_size: int) -> None:
    shares = [rank_share(num_samples, rank, world_size) for rank in range(world_size)]
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert [share.start for share in shares[1:]] == [share.stop for share in shares[:-1]]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(1000, seed=5, epoch=2)
    torch.manual_seed(123)
    assert torch.equal(order, epoch_order(1000, seed=5, epoch=2))
    assert not torch.equal(order, epoch_order(1000, seed=5, epoch=3))
    assert not torch.equal(order, epoch_order(1000, seed=6, epoch=2))
    orders = {
        tuple(balanced_order(torch.arange(1000) % 3, *key).tolist())
        for key in ((5, 2), (5, 3), (6, 2))  # seed, epoch
    }
    assert len(orders) == 3


def test_purposes_have_streams_of_their_own() -> None:
    draws = {float(torch.rand(1, generator=generator(purpose, 0))) for purpose in ("order", "augment", "weights")}
    assert len(draws) == 3
