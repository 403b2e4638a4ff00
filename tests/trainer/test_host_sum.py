"""Sums through shared memory: the bits of the tree, for every number of ranks and length; and who leaves is noticed."""

import os
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import host_sum
from trainer.host_sum import HostSum
from trainer.virtual_shards import sum_in_tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks elsewhere add up through gloo")

T = TypeVar("T")


def as_ranks(size: int, work: Callable[[int, HostSum], T]) -> list[T]:
    """What each rank's `work` returns; a rank is a thread, for which sockets and memory are the same."""
    name = uuid.uuid4().hex

    def rank(number: int) -> T:
        with closing(HostSum.join(name, number, size)) as sums:
            return work(number, sums)

    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(rank, number) for number in range(size)]]


def vectors(size: int, length: int, seed: int) -> list[torch.Tensor]:
    return list(torch.randn(size, length, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 9), length=st.integers(0, 70), num_sums=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_every_rank_has_the_sum_of_all_to_the_last_bit(size: int, length: int, num_sums: int, seed: int) -> None:
    with ExitStack() as undo:
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(host_sum, "ROOM", 16)  # so that some vectors are added up in parts
        given = [vectors(size, length, seed + number) for number in range(num_sums)]

        def work(rank: int, sums: HostSum) -> list[torch.Tensor]:
            mine = [of_all[rank].clone() for of_all in given]
            for vector in mine:
                sums.add_up(vector, size)
            return mine

        found = as_ranks(size, work)
    for number, of_all in enumerate(given):
        for mine in found:
            assert torch.equal(mine[number], found[0][number])
            torch.testing.assert_close(mine[number], torch.stack(of_all).sum(dim=0))
        if size in (2, 4, 8):
            expected = sum_in_tree([vector.clone() for vector in of_all].__getitem__, size)
            assert torch.equal(found[0][number], expected)


def test_spare_ranks_get_the_sum_and_add_nothing() -> None:
    given = vectors(3, 50, seed=0)

    def work(rank: int, sums: HostSum) -> torch.Tensor:
        mine = given[rank].clone() if rank < 2 else torch.full((50,), torch.nan)
        sums.add_up(mine, 2)
        return mine

    for found in as_ranks(3, work):
        assert torch.equal(found, given[0] + given[1])


def test_the_others_notice_who_is_gone() -> None:
    def work(rank: int, sums: HostSum) -> str:
        if rank == 2:
            return "left"
        with pytest.raises(ConnectionError):
            sums.add_up(torch.zeros(8), 4)
        return "noticed"

    assert as_ranks(4, work) == ["noticed", "noticed", "left", "noticed"]


def test_who_waits_for_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_sum, "MEET_S", 0.2)
    with pytest.raises(ConnectionError, match="rank 0 did not come"):
        HostSum.join(uuid.uuid4().hex, 1, 2)


def test_leaves_no_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    as_ranks(2, lambda rank, sums: sums.add_up(torch.ones(4), 2))
    assert len(os.listdir("/proc/self/fd")) == before
