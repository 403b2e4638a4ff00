"""How many CPUs and how much memory this process may use: its affinity mask and its cgroups' limits."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


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
