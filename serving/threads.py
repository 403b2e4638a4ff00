"""How many threads compute: the CPUs that we may really use, shared out among the instances of a model.

ONNX Runtime and torch size their pools by the host's CPUs. In a container with a quota the surplus threads only wait
for each other, and the kernel stops them all when the quota is used up.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """Args:
    num_cpus: what there is to share out.
    num_instances: of one model version.
    threads_per_instance: at least 1.
    """

    num_cpus: int
    num_instances: int
    threads_per_instance: int

    def __str__(self) -> str:
        return f"CPUs {self.num_cpus}, instances {self.num_instances}, threads of each {self.threads_per_instance}"


def plan_threads(num_instances: int, num_cpus: int | None = None) -> ThreadPlan:
    """Share the CPUs out among instances that compute at the same time.

    Args:
        num_cpus: None for all that this process may use.
    """
    num_cpus = num_cpus or num_available_cpus()
    return ThreadPlan(num_cpus, num_instances, max(1, num_cpus // num_instances))


def num_available_cpus(cgroup: Path = _CGROUP, own: Path = _OWN_CGROUPS) -> int:
    """The affinity mask's CPUs, cut to the quota of this process's cgroup and of those above it, at least 1.

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
