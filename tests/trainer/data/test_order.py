"""Every sample once an epoch, whatever the batch and the number of ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import epoch_order, generator, num_steps_per_epoch, rank_share

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


def test_purposes_have_streams_of_their_own() -> None:
    draws = {float(torch.rand(1, generator=generator(purpose, 0))) for purpose in ("order", "augment", "weights")}
    assert len(draws) == 3
