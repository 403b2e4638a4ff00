"""The instances of a model share its CPUs."""

import pytest

from convoy.cpus import num_available_cpus
from serving.models.threads import plan_threads


@pytest.mark.parametrize(("num_instances", "expected"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
def test_instances_share_the_cpus(num_instances, expected):
    plan = plan_threads(num_instances, 8)
    assert plan.threads_per_instance == expected
    assert str(plan) == f"CPUs 8, instances {num_instances}, threads of each {expected}"


def test_all_cpus_by_default():
    assert plan_threads(1).num_cpus == num_available_cpus()
