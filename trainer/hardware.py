"""Facts about this machine: precision support, and the description written into results."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from convoy.cpus import available_memory, num_available_cpus

_BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def has_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether bfloat16 convolutions are faster than float32 ones on this device, rather than emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(bfloat16_instructions())


def has_tf32(device: torch.device) -> bool:
    """Returns whether the device has TF32: NVIDIA's GPUs since Ampere have, which is compute capability 8."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def allow_tf32(is_allowed: bool) -> None:
    """Decides for this process whether GPUs may compute float32 convolutions and matrix products in TF32.

    torch allows it for convolutions unless told otherwise, and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 for products, too.
    TF32 keeps 10 of float32's 23 bits of a factor's fraction. The backward pass and a CUDA graph take the setting of
    the moment in which they are computed or captured.
    """
    torch.set_float32_matmul_precision("highest")  # on CPUs, too: a user's network may have asked for bfloat16
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = is_allowed
    if not is_allowed:  # or else convolutions follow `torch.backends.fp32_precision`
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Context in which GPUs compute float32 convolutions and matrix products in float32."""
    of_convolutions, of_products = tf32_settings()
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = of_convolutions, of_products


def tf32_settings() -> tuple[bool, bool]:
    """Returns whether this process allows TF32, for convolutions and for matrix products, by whichever setting."""
    backends: Any = torch.backends
    return backends.cudnn.conv.fp32_precision == "tf32", backends.cuda.matmul.fp32_precision == "tf32"


def bfloat16_instructions() -> list[str]:
    """Returns Linux's names of this machine's bfloat16 instructions; results differ between them in rounding."""
    return sorted(_BFLOAT16_INSTRUCTIONS & set(_cpuinfo("flags").split()))


def device_memory(device: torch.device) -> int:
    """Returns the memory of a GPU, or for the CPU that which this process may use, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return available_memory()


def describe(device: torch.device) -> dict[str, str | int]:
    """Returns the facts about this machine that a result depends on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cpus": num_available_cpus(),
        "memory_bytes": available_memory(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()
