"""CPUs and memory that this process may use, from its affinity mask and the limits of its cgroups."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def num_available_cpus(cgroup: Path = _CGROUP, own: Path = _OWN_CGROUPS) -> int:
    """Returns the number of CPUs that this process may use: its affinity mask, limited by the quotas of its cgroups.

    In a container, `os.cpu_count()` returns the host's CPUs, and threads beyond the quota only delay each other.

    Args:
        cgroup: mount point of the cgroup file system, version 2 or 1.
        own: file that lists this process's cgroups, a line `number:controllers:/path` each (`man 7 cgroups`).

    Returns:
        At least 1.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([num_cpus, *map(int, _quotas(cgroup, own))]))


def _quotas(cgroup: Path, own: Path) -> Iterator[float]:
    """Yields the quotas, in CPUs, of this process's cgroups and their parents. Skips cgroups without a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        root, read_quota = (cgroup / "cpu", _quota_v1) if controllers else (cgroup, _quota_v2)
        folder = PurePosixPath(path.lstrip("/"))
        for each in (folder, *folder.parents):  # in a container, the path may be the host's and only the root exist
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or it sets no limit
                yield read_quota(root / each)


def _quota_v2(folder: Path) -> float:
    quota_us, period_us = (folder / "cpu.max").read_text().split()
    return int(quota_us) / int(period_us)  # ValueError for "max", no limit


def _quota_v1(folder: Path) -> float:
    quota_us = int((folder / "cpu.cfs_quota_us").read_text())
    if quota_us < 0:
        raise ValueError("no limit")
    return quota_us / int((folder / "cpu.cfs_period_us").read_text())


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Returns the memory that this process may use, in bytes: the machine's, limited by its cgroup (v2 and v1)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int((cgroup / name).read_text()))
        except (OSError, ValueError):  # the file does not exist, or says "max"
            continue
    return memory
