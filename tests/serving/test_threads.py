"""The thread plan holds to the affinity mask and to the cgroup's quota."""

import os

import pytest

from serving.threads import num_available_cpus, plan_threads

AFFINITY = len(os.sched_getaffinity(0))


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
    assert num_available_cpus(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", AFFINITY), ("100000", 1), ("100000000", AFFINITY)])
def test_quota_of_cgroup_v1(tmp_path, quota, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert num_available_cpus(tmp_path) == expected


def test_no_cgroup_leaves_the_affinity_mask(tmp_path):
    assert num_available_cpus(tmp_path) == AFFINITY


@pytest.mark.parametrize(("num_instances", "expected"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
def test_instances_share_the_cpus(num_instances, expected):
    plan = plan_threads(num_instances, 8)
    assert plan.threads_per_instance == expected
    assert str(plan) == f"CPUs 8, instances {num_instances}, threads of each {expected}"


def test_all_cpus_by_default():
    assert plan_threads(1).num_cpus == num_available_cpus()
