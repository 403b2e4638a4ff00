"""CPUs and memory that this process may use, from its affinity mask and the limits of its cgroups."""

import contextlib
import math
import os
import resource
from collections.abc import Callable, Iterator
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
    return max(1, min([num_cpus, *_limits("cpu", _quota_v2, _quota_v1, cgroup, own)]))


def available_memory(cgroup: Path = _CGROUP, own: Path = _OWN_CGROUPS) -> int:
    """Returns the memory that this process may use, in bytes: the machine's, limited by its cgroups and `ulimit -v`.

    Args:
        cgroup: mount point of the cgroup file system, version 2 or 1.
        own: file that lists this process's cgroups, as for `num_available_cpus`.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        memory = min(memory, address_space)
    return min([memory, *_limits("memory", _memory_v2, _memory_v1, cgroup, own)])


def free_memory(process: Path = Path("/proc/self/statm"), machine: Path = Path("/proc/meminfo")) -> float:
    """Returns how many bytes more this process may take: what its limits leave, but not more than the machine has left.

    Args:
        process: its sizes in pages (`man 5 proc`); infinity is returned where there is no such file.
        machine: lines `MemAvailable: number kB`.
    """
    try:
        used = int(process.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        fields = dict(line.split(":", 1) for line in machine.read_text().splitlines())
        left = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return math.inf
    return max(0, min(left, available_memory() - used))


def _limits(
    controller: str,
    read_v2: Callable[[Path], int],
    read_v1: Callable[[Path], int],
    cgroup: Path,
    own: Path,
) -> Iterator[int]:
    """Yields the limits that a controller sets in this process's cgroups and their parents.

    Args:
        controller: its name, which is that of its folder in version 1.
        read_v2: reads the limit of a cgroup of version 2 from its folder; ValueError if there is none.
        read_v1: likewise for version 1.
    """
    for controllers, path in _own_cgroups(own):
        if controllers and controller not in controllers.split(","):
            continue
        root, read = (cgroup / controller, read_v1) if controllers else (cgroup, read_v2)
        folder = PurePosixPath(path.lstrip("/"))
        for each in (folder, *folder.parents):  # in a container, the path may be the host's and only the root exist
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or it sets no limit
                yield read(root / each)


def _own_cgroups(own: Path) -> list[tuple[str, str]]:
    """Returns the controllers and the path of each cgroup; where they cannot be read, the roots of both versions."""
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:
        lines = ["0::/", "1:cpu,memory:/"]
    fields = (line.split(":", 2) for line in lines)
    return [(each[1], each[2]) for each in fields if len(each) == 3]


def _quota_v2(folder: Path) -> int:
    quota_us, period_us = (folder / "cpu.max").read_text().split()
    return int(quota_us) // int(period_us)  # ValueError for "max", no limit


def _quota_v1(folder: Path) -> int:
    quota_us = int((folder / "cpu.cfs_quota_us").read_text())
    if quota_us < 0:
        raise ValueError("no limit")
    return quota_us // int((folder / "cpu.cfs_period_us").read_text())


def _memory_v2(folder: Path) -> int:
    return int((folder / "memory.max").read_text())  # ValueError for "max", no limit


def _memory_v1(folder: Path) -> int:
    return int((folder / "memory.limit_in_bytes").read_text())  # far more than the machine has if there is no limit
