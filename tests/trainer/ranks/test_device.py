"""The device of a rank."""

import os

import pytest
import torch

from trainer.errors import ConfigError
from trainer.ranks.device import choose_device
from trainer.ranks.environment import RankEnvironment


def rank_of(rank: int, size: int, *, num_hosts: int = 1) -> RankEnvironment:
    """A rank of the first host."""
    return RankEnvironment(rank=rank, local_rank=rank, local_world_size=size, world_size=size * num_hosts)


@pytest.fixture
def chosen_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretends that this machine has two GPUs; returns a list that gets the indices of those that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    return chosen


def test_each_rank_gets_a_gpu_that_computes_the_same_bits_each_time(chosen_gpus: list[int]) -> None:
    assert choose_device("auto", rank_of(1, 2)) == torch.device("cuda", 1)
    assert chosen_gpus == [1]
    assert torch.backends.cudnn.deterministic


def test_more_ranks_than_gpus_are_refused(chosen_gpus: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"this host has 2 GPUs: use at most 2, or .*--allow-shared-gpu"):
        choose_device("auto", rank_of(0, 4))
    assert choose_device("cpu", rank_of(0, 4)) == torch.device("cpu")
    assert chosen_gpus == []


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_ranks_that_share_gpus_are_hosts_of_their_own_for_nccl(
    num_hosts: int, chosen_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NCCL_HOSTID", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "")  # so that it is removed afterwards
        monkeypatch.delenv(name)
    choose_device("auto", rank_of(1, 2, num_hosts=num_hosts))
    assert "NCCL_HOSTID" not in os.environ
    chosen_gpus.clear()
    found = set()
    for rank in range(5):
        choose_device("auto", rank_of(rank, 5, num_hosts=num_hosts), allow_shared_gpu=True)
        found.add(os.environ["NCCL_HOSTID"])
    assert chosen_gpus == [0, 1, 0, 1, 0]
    assert len(found) == 5
    assert os.environ.get("NCCL_SOCKET_IFNAME") == ("lo" if num_hosts == 1 else None)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda", rank_of(0, 1))
    assert choose_device("auto", rank_of(0, 1)) == torch.device("cpu")
