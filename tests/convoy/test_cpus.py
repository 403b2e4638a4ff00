"""CPU and memory limits of both cgroup versions, and the affinity mask."""

import math
import os
from pathlib import Path

import pytest

from convoy.cpus import available_memory, free_memory, num_available_cpus

AFFINITY = len(os.sched_getaffinity(0))
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available(folder: Path, own: str) -> int:
    """The number of CPUs with a folder in place of /sys/fs/cgroup and a text in place of /proc/self/cgroup."""
    (folder / "own").write_text(own)
    return num_available_cpus(folder, folder / "own")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max 100000", AFFINITY),
        ("50000 100000", 1),
        ("150000 100000", 1),
        ("10000000000 100000", AFFINITY),
        ("nonsense", AFFINITY),
        ("1 0", AFFINITY),
    ],
)
def test_quota_of_cgroup_v2(tmp_path, content, expected):
    (tmp_path / "cpu.max").write_text(content + "\n")
    assert available(tmp_path, "0::/\n") == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", AFFINITY), ("100000", 1), ("100000000", AFFINITY)])
def test_quota_of_cgroup_v1(tmp_path, quota, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert available(tmp_path, "2:cpuset:/\n1:cpu,cpuacct:/\n0::/\n") == expected


@pytest.mark.parametrize("limited", ["a/b", "a", "."])
@pytest.mark.parametrize(("own", "root"), [("0::/a/b", ""), ("3:cpuacct,cpu:/a/b", "cpu"), ("0::/a/b/not/seen", "")])
def test_the_quota_of_each_parent_cgroup_counts(tmp_path, own, root, limited):
    for folder in ("a/b", "a", "."):
        (tmp_path / root / folder).mkdir(parents=True, exist_ok=True)
        quota_us = 100_000 if folder == limited else 100_000 * (AFFINITY + 1)
        (tmp_path / root / folder / "cpu.max").write_text(f"{quota_us} 100000")
        (tmp_path / root / folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        (tmp_path / root / folder / "cpu.cfs_period_us").write_text("100000")
    assert available(tmp_path, own) == 1


def test_the_quota_of_another_cgroup_does_not_count(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/cpu.max").write_text("100000 100000")
    assert available(tmp_path, "0::/own") == AFFINITY


def test_without_cgroups_the_affinity_mask_counts(tmp_path):
    assert available(tmp_path, "0::/\n") == AFFINITY
    assert num_available_cpus(tmp_path, tmp_path / "none") == AFFINITY


@pytest.mark.parametrize(
    ("name", "limit", "expected"),
    [
        ("memory.max", "1000000\n", 1_000_000),
        ("memory.max", "max\n", MEMORY),
        ("memory/memory.limit_in_bytes", "2000000\n", 2_000_000),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", MEMORY),
        ("nothing", "", MEMORY),
    ],
)
@pytest.mark.parametrize("own", ["0::/\n4:memory:/\n", None])
def test_the_memory_limit_of_both_cgroup_versions(
    name: str, limit: str, expected: int, own: str | None, tmp_path: Path
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / name).write_text(limit)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert available_memory(tmp_path, tmp_path / "own") == expected


def test_the_limit_on_the_address_space_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (3_000_000, -1))
    assert available_memory(tmp_path, tmp_path / "none") == 3_000_000


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": "2000000"}, 2_000_000),
        ("0::/a/b\n", {"a/memory.max": "3000000", "a/b/memory.max": "max"}, 3_000_000),
        ("0::/a/b\n", {"a/memory.max": "max", "a/b/memory.max": "4000000", "memory.max": "5000000"}, 4_000_000),
        ("5:memory:/user/7\n4:cpu:/\n", {"memory/user/7/memory.limit_in_bytes": "6000000"}, 6_000_000),
        ("0::/a\n", {"other/memory.max": "1000000"}, MEMORY),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "1000000"}, MEMORY),
        ("\nnonsense\n0::/a\n", {"a/memory.max": "7000000"}, 7_000_000),
    ],
)
def test_the_memory_limits_of_the_own_cgroup_and_its_parents_count(
    own: str, limits: dict[str, str], expected: int, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(limit)
    assert available_memory(tmp_path, tmp_path / "own") == expected


def test_free_memory_is_what_the_machine_and_the_limits_leave(tmp_path):
    process, machine = tmp_path / "statm", tmp_path / "meminfo"
    assert free_memory(process, machine) == math.inf
    process.write_text("500 1 3\n")
    machine.write_text("MemTotal: 100 kB\nMemAvailable: 8 kB\n")
    assert free_memory(process, machine) == 8 * 1024
    process.write_text(f"{10**12} {10**12} 3\n")
    assert free_memory(process, machine) == 0
    assert 0 < free_memory() < math.inf
