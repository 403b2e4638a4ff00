"""How many threads compute: the CPUs that we may really use, shared out among the instances of a model.

ONNX Runtime and torch size their pools by the host's CPUs. In a container with a quota the surplus threads only wait
for each other, and the kernel stops them all when the quota is used up.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


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


def num_available_cpus(cgroup: Path = _CGROUP) -> int:
    """The affinity mask's CPUs, cut to the cgroup's quota (v2 and v1), at least 1."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for read_quota in (_quota_v2, _quota_v1):
        try:
            return max(1, min(num_cpus, int(read_quota(cgroup))))
        except (OSError, ValueError, OverflowError, ZeroDivisionError):
            continue  # no such file, or no limit in it
    return num_cpus


def _quota_v2(cgroup: Path) -> float:
    """CPUs' worth of time; a ValueError for no limit, which is the word "max"."""
    quota_us, period_us = (cgroup / "cpu.max").read_text().split()
    return int(quota_us) / int(period_us)


def _quota_v1(cgroup: Path) -> float:
    quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
    if quota_us < 0:
        raise ValueError("no limit")
    return quota_us / int((cgroup / "cpu/cpu.cfs_period_us").read_text())
