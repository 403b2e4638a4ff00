"""The device of a rank."""

import os

import pytest
import torch

from trainer.errors import ConfigError
from trainer.ranks.device import choose_device, separate_for_nccl


@pytest.fixture
def chosen_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretends that this machine has two GPUs; returns a list that gets the indices of those that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    return chosen


def test_each_rank_gets_a_gpu_that_computes_the_same_bits_each_time(chosen_gpus: list[int]) -> None:
    assert choose_device("auto", local_rank=1, local_size=2) == torch.device("cuda", 1)
    assert chosen_gpus == [1]
    assert torch.backends.cudnn.deterministic


def test_more_ranks_than_gpus_are_refused(chosen_gpus: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"this host has 2 GPUs: use at most 2, or .*--allow-shared-gpu"):
        choose_device("auto", local_rank=0, local_size=4)
    assert choose_device("cpu", local_rank=0, local_size=4) == torch.device("cpu")
    assert chosen_gpus == []


def test_ranks_may_share_gpus(chosen_gpus: list[int]) -> None:
    for local_rank in range(5):
        choose_device("auto", local_rank=local_rank, local_size=5, allow_shared_gpu=True)
    assert chosen_gpus == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("is_only_host", [True, False])
def test_ranks_that_share_a_gpu_are_hosts_of_their_own_for_nccl(
    is_only_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NCCL_HOSTID", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "")  # so that it is removed afterwards
        monkeypatch.delenv(name)
    found = set()
    for rank in range(3):
        separate_for_nccl(rank, is_only_host=is_only_host)
        found.add(os.environ["NCCL_HOSTID"])
    assert len(found) == 3
    assert os.environ.get("NCCL_SOCKET_IFNAME") == ("lo" if is_only_host else None)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda", local_rank=0, local_size=1)
    assert choose_device("auto", local_rank=0, local_size=1) == torch.device("cpu")
