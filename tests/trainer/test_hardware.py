"""CPU quotas of both cgroup versions; memory that stays; what is written about the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.hardware import available_memory, describe, num_available_cpus

NUM_CPUS = len(os.sched_getaffinity(0))
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available(folder: Path, own: str) -> int:
    """With the folder in place of /sys/fs/cgroup, and a text in place of /proc/self/cgroup."""
    (folder / "own").write_text(own)
    return num_available_cpus(folder, folder / "own")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", NUM_CPUS),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("100000000 100000", NUM_CPUS),
        ("damaged", NUM_CPUS),
    ],
)
def test_the_quota_of_cgroup_v2_is_kept(quota: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available(tmp_path, "0::/\n") == expected


@pytest.mark.parametrize(("quota_us", "expected"), [("-1", NUM_CPUS), ("100000", 1), ("10000000", NUM_CPUS)])
def test_the_quota_of_cgroup_v1_is_kept(quota_us: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota_us)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert available(tmp_path, "1:cpu,cpuacct:/\n0::/\n") == expected


@pytest.mark.parametrize(("own", "root"), [("0::/pod/container", ""), ("4:cpu,cpuacct:/pod/container", "cpu")])
def test_a_quota_further_up_is_kept(own: str, root: str, tmp_path: Path) -> None:
    (tmp_path / root / "pod" / "container").mkdir(parents=True)
    (tmp_path / root / "pod" / "cpu.max").write_text("100000 100000")
    (tmp_path / root / "pod" / "cpu.cfs_quota_us").write_text("100000")
    (tmp_path / root / "pod" / "cpu.cfs_period_us").write_text("100000")
    assert available(tmp_path, own) == 1


def test_without_a_cgroup_the_affinity_counts(tmp_path: Path) -> None:
    assert available(tmp_path, "0::/nothing") == NUM_CPUS
    assert num_available_cpus(tmp_path, tmp_path / "nothing") == NUM_CPUS


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
def test_the_memory_limit_of_both_cgroup_versions_is_kept(name: str, limit: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / name).write_text(limit)
    assert available_memory(tmp_path) == expected


# The first convolution makes more than 32 MB, which glibc maps afresh each time; with less, that is a matter of chance.
COUNT_FAULTS = """
import resource, sys, torch
from trainer.hardware import keep_freed_memory
from trainer.models.lecture import LectureNet
if sys.argv[1] == "keep":
    keep_freed_memory()
net = LectureNet(num_channels=1, image_size=28, num_classes=10).to(memory_format=torch.channels_last)
images = torch.randn(500, 1, 28, 28)
for step in range(12):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    net(images).sum().backward()
    net.zero_grad()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 8)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "leave")
    }
    assert faults["keep"] < faults["leave"] / 4, faults


def test_the_machine_is_described() -> None:
    described = describe(torch.device("cpu"))
    assert described["cpus"] == num_available_cpus()
    assert described["torch"] == torch.__version__
    assert described["device"]
