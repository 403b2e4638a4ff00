"""The machine under us: how many CPUs and how much memory we may use, how freed memory is kept, what to write down."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>, the same on every glibc


def num_available_cpus(cgroup: Path = _CGROUP, own: Path = _OWN_CGROUPS) -> int:
    """CPUs that this process may really use: its affinity mask, cut to its cgroups' quotas, at least 1.

    Inside a container `os.cpu_count()` tells the host's CPUs, and threads beyond the quota only wait for each other.

    Args:
        cgroup: where cgroups are mounted, of version 2 or 1.
        own: which are this process's, a line `number:controllers:/path` each (`man 7 cgroups`).
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([num_cpus, *map(int, _quotas(cgroup, own))]))


def _quotas(cgroup: Path, own: Path) -> Iterator[float]:
    """CPUs' worth of time that this process's cgroups, and those above them, grant where they set a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        root, read_quota = (cgroup / "cpu", _quota_v1) if controllers else (cgroup, _quota_v2)
        folder = PurePosixPath(path.lstrip("/"))
        for each in (folder, *folder.parents):  # in a container the path may be the host's: then only its root is here
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or no limit in it
                yield read_quota(root / each)


def _quota_v2(folder: Path) -> float:
    """A ValueError for no limit, which is the word "max"."""
    quota_us, period_us = (folder / "cpu.max").read_text().split()
    return int(quota_us) / int(period_us)


def _quota_v1(folder: Path) -> float:
    quota_us = int((folder / "cpu.cfs_quota_us").read_text())
    if quota_us < 0:
        raise ValueError("no limit")
    return quota_us / int((folder / "cpu.cfs_period_us").read_text())


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of memory that this process may use at most: the machine's, cut to the cgroup's limit (v2 and v1)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int((cgroup / name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return memory


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors instead of returning it to the kernel.

    By default every activation of more than a few hundred kB is a fresh `mmap`: 3,520 page faults a step for the
    lecture's net at batch 100, and half of its time. So nothing is mapped, and the heap's top is never trimmed. Does
    nothing where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        return


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are faster than float32 here, and not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(bfloat16_instructions())


def bfloat16_instructions() -> list[str]:
    """What this machine's CPUs have for bfloat16, in Linux' names; each rounds in its own way."""
    return sorted(_BFLOAT16_INSTRUCTIONS & set(_cpuinfo("flags").split()))


def describe(device: torch.device) -> dict[str, str | int]:
    """What a reader of a result must know about the machine."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cpus": num_available_cpus(),
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
