"""Where the instances of a model go: onto the CPU, or onto which GPUs. Imports no library that computes."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from serving.errors import LoadError

Device = Literal["auto", "cpu", "cuda"]
"""What the operator allows: GPUs if there are any, none, or at least one."""


class CudaUnusable(LoadError):
    """There is a GPU, and the backend's own libraries for it do not load."""


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """Some equal instances of a model.

    Args:
        kind: "auto" is a GPU where there is one.
        count: how many on each GPU, or in all on the CPU.
        gpus: which; none for all.
    """

    kind: Literal["auto", "cpu", "gpu"] = "auto"
    count: int = 1
    gpus: tuple[int, ...] = ()


def assign_devices(groups: Sequence[InstanceGroup], device: Device) -> list[int | None]:
    """The GPU of each instance, or None for the CPU.

    Raises:
        LoadError: a group asks for a GPU that is not there.
    """
    num_gpus = 0 if device == "cpu" else count_gpus()
    placements: list[int | None] = []
    for group in groups or (InstanceGroup(),):
        if group.kind == "cpu" or (group.kind == "auto" and num_gpus == 0):
            placements += [None] * group.count
            continue
        gpus = group.gpus or tuple(range(num_gpus))
        if not gpus or max(gpus) >= num_gpus:
            wanted = f"GPU {max(gpus)}" if gpus else "a GPU"
            reason = "the server was started with --device cpu" if device == "cpu" else f"there are {num_gpus} GPUs"
            raise LoadError(f"instance_group asks for {wanted}, and {reason}")
        placements += [gpu for gpu in gpus for _ in range(group.count)]
    return placements


@cache
def count_gpus() -> int:
    """CUDA devices that this process sees (CUDA_VISIBLE_DEVICES counts), asked of the driver itself."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
