"""Assigns devices and CPU threads to the instances of a model. Imports no inference library."""

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from convoy.cpus import num_available_cpus
from serving.errors import LoadError
from serving.inference.rate_limiter import Resource

logger = logging.getLogger(__name__)

_CUDA_ERROR_NO_DEVICE = 100

Device = Literal["auto", "cpu", "cuda"]
"""The devices that the operator allows: GPUs if there are any, CPUs only, or GPUs only."""


class CudaUnavailable(LoadError):
    """The machine has a GPU, but the backend cannot use it, for example because CUDA libraries are missing."""


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """A number of identical instances of a model.

    Args:
        kind: "auto" uses the GPU if there is one.
        count: instances on each GPU, or in total on the CPU.
        gpus: indices of the GPUs to use; empty for all.
        resources: of each instance, for the rate limiter.
        priority: of its turns; 1 for the most.
    """

    kind: Literal["auto", "cpu", "gpu"] = "auto"
    count: int = 1
    gpus: tuple[int, ...] = ()
    resources: tuple[Resource, ...] = ()
    priority: int = 1


def assign_devices(groups: Sequence[InstanceGroup], device: Device) -> list[tuple[int | None, InstanceGroup]]:
    """Returns the GPU of each instance, or None for the CPU, and its group.

    Args:
        groups: empty for the default, a single group of kind "auto".

    Raises:
        LoadError: a group asks for a GPU that does not exist or is not allowed.
    """
    num_gpus = 0 if device == "cpu" else count_gpus()
    assigned: list[tuple[int | None, InstanceGroup]] = []
    for group in groups or (InstanceGroup(),):
        if group.kind == "cpu" or (group.kind == "auto" and num_gpus == 0):
            assigned += [(None, group)] * group.count
            continue
        gpus = group.gpus or tuple(range(num_gpus))
        if not gpus or max(gpus) >= num_gpus:
            wanted = f"GPU {max(gpus)}" if gpus else "a GPU"
            reason = "the server was started with --device cpu" if device == "cpu" else f"there are {num_gpus} GPUs"
            raise LoadError(f"instance_group asks for {wanted}, but {reason}")
        assigned += [(gpu, group) for gpu in gpus for _ in range(group.count)]
    return assigned


def threads_per_instance(num_instances: int, num_threads: int | None = None) -> int:
    """Returns the number of CPU threads for each instance of a model version, at least 1.

    The instances of one version compute at the same time and share the threads. Versions do not share them: each may
    use all. A fixed share would leave CPUs idle whenever one model is busy and the others are not, which is the usual
    case, and would have to shrink when models are loaded later or a new version is loaded beside the old one. Versions
    that are busy at once compete for CPU time, which costs little because idle threads do not spin. Measured on 2 CPUs
    with the MNIST convnet, batches of 64, as milliseconds per batch: one busy model 0.61 with 2 threads and 0.94 with
    1; two busy models 0.59 with 2 threads each and 0.74 with 1 each.

    Args:
        num_threads: for each model version; None for all CPUs that the affinity mask and the container's quota grant.
            ONNX Runtime and torch would start a thread for each of the host's CPUs, and threads beyond the quota only
            delay each other.
    """
    return max(1, (num_threads or num_available_cpus()) // num_instances)


@cache
def count_gpus() -> int:
    """Returns the number of CUDA devices visible to this process, as the driver reports them.

    Warns if there is a driver and it fails, because the devices are unknown then rather than absent.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error not in (0, _CUDA_ERROR_NO_DEVICE):
        logger.warning("the CUDA driver fails with error %d: models run on the CPU", error)
    return 0 if error else count.value
