"""The one place that decides whether a tensor's operations are Triton kernels or torch's own."""

import functools
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread

import torch

from trainer.errors import in_one_line

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
"""From here GPUs multiply matrices in bfloat16, and have the 96 KB of shared memory that our products take."""
MAX_NUMEL = 2**31
"""The kernels count with 32 bits."""

_allowed = True


def is_fused(x: torch.Tensor) -> bool:
    """Returns whether operations on a tensor use the kernels: on GPUs where Triton works, in a backward pass's types.

    False for what is traced or transformed by torch (`torch.compile` fuses by itself), and without gradients: what is
    evaluated, exported and served is computed by torch's operations.
    """
    return (
        is_fusible(x)
        and torch.is_grad_enabled()
        and x.dtype in _DTYPES
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_fusible(x: torch.Tensor) -> bool:
    """Returns whether kernels can read a tensor, of whatever type."""
    if not _is_supported(x.device) or torch.compiler.is_compiling():
        return False
    return _allowed and 0 < x.numel() < MAX_NUMEL and unsupported_reason(x.device) is None


@contextmanager
def torch_only() -> Iterator[None]:
    """Context in which all operations are torch's own, for comparisons."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def unsupported_reason(device: torch.device) -> str | None:
    """Returns why a GPU does without the kernels, in one line; None if they work there.

    The first call on a device waits for `try_kernels`, and must not be made during the capture of a CUDA graph.
    """
    return try_kernels(device).result()


@functools.cache
def try_kernels(device: torch.device) -> Future[str | None]:
    """Starts to compile and run a small kernel in a thread of its own; returns the future `unsupported_reason`.

    Triton needs a C compiler and a cache folder, and may not know the GPU.
    """
    found: Future[str | None] = Future()
    Thread(target=lambda: found.set_result(_try_kernels(device)), name="try-kernels", daemon=True).start()
    return found


def _try_kernels(device: torch.device) -> str | None:
    try:
        from trainer.kernels.fused import add_up

        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < _LEAST_CAPABILITY:
                found = ".".join(map(str, capability))
                return f"they need a GPU of capability 8.0 (Ampere) or later, and this one has {found}"
            torch.cuda.set_device(device)
        with torch.no_grad():
            total = add_up(torch.ones(2, 3, device=device)).tolist()
    except Exception as error:
        return in_one_line(error)[:200]
    return None if total == [2.0, 2.0, 2.0] else f"a sum of ones is {total}, not 2"


def _is_supported(device: torch.device) -> bool:
    return device.type == "cuda"
