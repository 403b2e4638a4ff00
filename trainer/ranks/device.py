"""Choice of the device that a rank computes on."""

import torch

from trainer.config import DeviceChoice
from trainer.errors import ConfigError


def choose_device(choice: DeviceChoice, local_rank: int, local_size: int) -> torch.device:
    """Returns the device of a rank: the GPU of its local rank, or the CPU.

    On a GPU, also makes cuDNN deterministic: otherwise it may add up the gradient of a filter in the order in which
    blocks finish, and a run that continues after a kill, or on other ranks under virtual shards, ends in other weights.

    Args:
        local_size: number of ranks on this host.

    Raises:
        ConfigError: more ranks than GPUs on this host, or `cuda` where there is no GPU.
    """
    num_gpus = torch.cuda.device_count() if choice != "cpu" else 0
    if num_gpus == 0:
        if choice == "cuda":
            raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu, or fix the driver")
        return torch.device("cpu")
    if local_size > num_gpus:
        raise ConfigError(
            f"--nproc_per_node={local_size}, but this host has {num_gpus} GPU{'s' if num_gpus > 1 else ''}: "
            f"use at most {num_gpus}, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", local_rank)
