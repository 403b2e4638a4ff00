"""Choice of the device that a rank computes on."""

import os
import socket

import torch

from trainer.config import DeviceChoice
from trainer.errors import ConfigError
from trainer.ranks.environment import RankEnvironment


def choose_device(
    choice: DeviceChoice, environment: RankEnvironment, *, allow_shared_gpu: bool = False
) -> torch.device:
    """Returns the device of a rank: the GPU of its local rank, or the CPU. Call it before NCCL starts.

    On a GPU, also makes cuDNN deterministic: otherwise it may add up the gradient of a filter in the order in which
    blocks finish, and a run that continues after a kill, or on other ranks under virtual shards, ends in other weights.

    Args:
        allow_shared_gpu: the GPUs are dealt out in turn if there are more ranks.

    Raises:
        ConfigError: more ranks than GPUs on this host, or `cuda` where there is no GPU.
    """
    local_size = environment.local_world_size
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
    if local_size > num_gpus:
        _separate_for_nccl(environment)
    number = environment.local_rank % num_gpus
    torch.cuda.set_device(number)
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", number)


def _separate_for_nccl(environment: RankEnvironment) -> None:
    """Makes NCCL take each rank for a host of its own: it refuses two ranks on one GPU of one host.

    The ranks then exchange data through sockets, as hosts do. Where there are several hosts, the user says by NCCL's
    variables which network there is.
    """
    os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-rank{environment.rank}"
    if environment.has_one_host:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
