"""Choice of the device that a rank computes on."""

import os
import socket

import torch

from trainer.config import DeviceChoice
from trainer.errors import ConfigError


def choose_device(
    choice: DeviceChoice, local_rank: int, local_size: int, *, allow_shared_gpu: bool = False
) -> torch.device:
    """Returns the device of a rank: the GPU of its local rank, or the CPU.

    On a GPU, also makes cuDNN deterministic: otherwise it may add up the gradient of a filter in the order in which
    blocks finish, and a run that continues after a kill, or on other ranks under virtual shards, ends in other weights.

    Args:
        local_size: number of ranks on this host.
        allow_shared_gpu: the GPUs are dealt out in turn if there are more ranks; see `separate_for_nccl`.

    Raises:
        ConfigError: more ranks than GPUs on this host, or `cuda` where there is no GPU.
    """
    num_gpus = torch.cuda.device_count() if choice != "cpu" else 0
    if num_gpus == 0:
        if choice == "cuda":
            raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu, or fix the driver")
        return torch.device("cpu")
    if local_size > num_gpus and not allow_shared_gpu:
        raise ConfigError(
            f"--nproc_per_node={local_size}, but this host has {num_gpus} GPU{'s' if num_gpus > 1 else ''}: "
            f"use at most {num_gpus}, or --device cpu; a training may also share GPUs, which is slow: "
            "--allow-shared-gpu"
        )
    number = local_rank % num_gpus
    torch.cuda.set_device(number)
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", number)


def separate_for_nccl(rank: int, *, is_only_host: bool) -> None:
    """Makes NCCL take each rank for a host of its own: it refuses two ranks on one GPU of one host.

    Call it before NCCL starts. The ranks then exchange data through sockets, as hosts do.

    Args:
        is_only_host: all ranks are on this host; else the user says by NCCL's variables which network there is.
    """
    os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-rank{rank}"
    if is_only_host:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
