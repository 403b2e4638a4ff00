"""The device of a rank."""

import pytest
import torch

from trainer.errors import ConfigError
from trainer.ranks.device import choose_device


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
    with pytest.raises(ConfigError, match="this host has 2 GPUs: use at most 2"):
        choose_device("auto", local_rank=0, local_size=4)
    assert choose_device("cpu", local_rank=0, local_size=4) == torch.device("cpu")
    assert chosen_gpus == []


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda", local_rank=0, local_size=1)
    assert choose_device("auto", local_rank=0, local_size=1) == torch.device("cpu")
