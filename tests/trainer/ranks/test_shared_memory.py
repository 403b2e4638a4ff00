"""Sums through shared memory: the bits of the tree for every number of ranks and length, and lost ranks."""

import itertools
import os
import socket
import struct
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

from trainer.loop.shards import sum_in_tree
from trainer.ranks import shared_memory
from trainer.ranks.shared_memory import SharedMemoryReducer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks add up through gloo")

T = TypeVar("T")


def as_ranks(size: int, work: Callable[[int, SharedMemoryReducer], T]) -> list[T]:
    """Returns what each rank's `work` returns. Each rank is a thread: sockets and memory work the same."""
    name = uuid.uuid4().hex

    def rank(number: int) -> T:
        with closing(SharedMemoryReducer.join(name, number, size)) as sums:
            return work(number, sums)

    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(rank, number) for number in range(size)]]


def vectors(size: int, length: int, seed: int) -> list[torch.Tensor]:
    return list(torch.randn(size, length, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 9), length=st.integers(0, 70), num_sums=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_every_rank_has_the_sum_of_all_to_the_last_bit(size: int, length: int, num_sums: int, seed: int) -> None:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(shared_memory, "CHUNK_SIZE", 16)  # so that some vectors need several chunks
        given = [vectors(size, length, seed + number) for number in range(num_sums)]

        def work(rank: int, sums: SharedMemoryReducer) -> list[torch.Tensor]:
            mine = [of_all[rank].clone() for of_all in given]
            for vector in mine:
                sums.all_reduce(vector, size)
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

    def work(rank: int, sums: SharedMemoryReducer) -> torch.Tensor:
        mine = given[rank].clone() if rank < 2 else torch.full((50,), torch.nan)
        sums.all_reduce(mine, 2)
        return mine

    for found in as_ranks(3, work):
        assert torch.equal(found, given[0] + given[1])


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_all_ranks_see_a_stop_flag_at_the_same_sum(size: int) -> None:
    def work(rank: int, sums: SharedMemoryReducer) -> list[bool]:
        flags = []
        for step in range(4):
            sums.stop_requested = (rank, step) == (size - 1, 2)
            sums.all_reduce(torch.ones(5), size)
            flags.append(sums.stop_agreed)
        return flags

    assert as_ranks(size, work) == [[False, False, True, False]] * size


def test_the_other_ranks_notice_a_lost_rank() -> None:
    def work(rank: int, sums: SharedMemoryReducer) -> str:
        if rank == 2:
            return "left"
        with pytest.raises(ConnectionError):
            sums.all_reduce(torch.zeros(8), 4)
        return "noticed"

    assert as_ranks(4, work) == ["noticed", "noticed", "left", "noticed"]


def test_without_rank_0_the_other_ranks_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(ConnectionError, match="rank 0 does not listen"):
        SharedMemoryReducer.join(uuid.uuid4().hex, 1, 2)


def test_no_descriptors_remain_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    as_ranks(2, lambda rank, sums: sums.all_reduce(torch.ones(4), 2))
    assert len(os.listdir("/proc/self/fd")) == before


def test_connections_of_other_processes_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's process, and processes that send nothing, something else, or a rank that does not exist."""
    monkeypatch.setattr(shared_memory, "HANDSHAKE_TIMEOUT_S", 0.5)
    name, receive_rank = uuid.uuid4().hex, shared_memory._receive_rank
    accepted = []

    def first_of_another_user(connection: socket.socket) -> int | None:
        accepted.append(connection)
        with monkeypatch.context() as patch:
            if len(accepted) == 1:
                patch.setattr(os, "getuid", lambda: -1)
            return receive_rank(connection)

    monkeypatch.setattr(shared_memory, "_receive_rank", first_of_another_user)
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        first = pool.submit(SharedMemoryReducer.join, name, 0, 2)
        for stranger, message in zip(strangers, [b"", b"", b"GET / HTTP/1.1", struct.pack("i", 7)], strict=True):
            stack.enter_context(stranger)
            shared_memory._connect(stranger, f"\0convoy/{name}")
            if message:
                stranger.send(message)
        ranks = [first, pool.submit(SharedMemoryReducer.join, name, 1, 2)]
        sums = [torch.ones(3), torch.ones(3)]
        joined = [stack.enter_context(closing(rank.result())) for rank in ranks]
        for done in [pool.submit(rank.all_reduce, mine, 2) for rank, mine in zip(joined, sums, strict=True)]:
            done.result()
    assert len(accepted) == 5
    assert [mine.tolist() for mine in sums] == [[2.0] * 3] * 2


def test_a_rank_that_does_not_connect_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "CONNECT_TIMEOUT_S", 0.3)
    with pytest.raises(ConnectionError, match="the ranks of this host could not connect to each other: timed out"):
        SharedMemoryReducer.join(uuid.uuid4().hex, 0, 2)


def test_few_descriptors_are_open_while_many_ranks_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections at once would be 2 * 32 * 5 descriptors."""
    size, distances, counts, send_fds = 32, [1, 2, 4, 8, 16], [], socket.send_fds

    def watched(peer: socket.socket, message: list[bytes], descriptors: list[int]) -> int:
        counts.append(num_open())
        return send_fds(peer, message, descriptors)

    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(socket, "send_fds", watched)
    with ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(size)]
        for end in itertools.chain(*pairs):
            stack.enter_context(end)
        before = num_open()
        for descriptor in shared_memory._distribute_descriptors(
            {rank: pairs[rank][0] for rank in range(size)}, size, distances, stack
        ):
            os.close(descriptor)
    assert len(counts) == size - 1
    assert max(counts) - before < 3 * size
