"""Devices and threads of instances, from the configuration and the operator's settings."""

from types import SimpleNamespace

import pytest

from convoy.cpus import num_available_cpus
from serving.errors import LoadError
from serving.models import devices
from serving.models.devices import InstanceGroup, assign_devices, threads_per_instance


@pytest.fixture
def num_gpus(monkeypatch):
    def pretend(number: int) -> None:
        monkeypatch.setattr(devices, "count_gpus", lambda: number)

    return pretend


@pytest.mark.parametrize(
    ("groups", "device", "gpus", "expected"),
    [
        ([], "auto", 0, [None]),
        ([], "auto", 3, [0, 1, 2]),
        ([], "cpu", 3, [None]),
        ([InstanceGroup("auto", 2)], "auto", 2, [0, 0, 1, 1]),
        ([InstanceGroup("auto", 2, (1,))], "auto", 2, [1, 1]),
        ([InstanceGroup("auto", 2, (1,))], "auto", 0, [None, None]),
        ([InstanceGroup("cpu", 3)], "cuda", 2, [None, None, None]),
        ([InstanceGroup("gpu")], "cuda", 2, [0, 1]),
        ([InstanceGroup("gpu", 1, (0,)), InstanceGroup("cpu", 1)], "auto", 1, [0, None]),
    ],
)
def test_instances_are_assigned_to_devices(num_gpus, groups, device, gpus, expected):
    num_gpus(gpus)
    assert [gpu for gpu, _ in assign_devices(groups, device)] == expected


@pytest.mark.parametrize(
    ("group", "device", "gpus", "reason"),
    [
        (InstanceGroup("gpu"), "auto", 0, "asks for a GPU, but there are 0 GPUs"),
        (InstanceGroup("gpu", 1, (0, 2)), "auto", 2, "asks for GPU 2, but there are 2 GPUs"),
        (InstanceGroup("gpu"), "cpu", 4, "the server was started with --device cpu"),
    ],
)
def test_a_missing_gpu_is_rejected(num_gpus, group, device, gpus, reason):
    num_gpus(gpus)
    with pytest.raises(LoadError, match=reason):
        assign_devices([group], device)


@pytest.mark.parametrize(("num_instances", "expected"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
def test_instances_share_the_threads(num_instances, expected):
    assert threads_per_instance(num_instances, 8) == expected


def test_by_default_all_available_cpus_are_shared():
    assert threads_per_instance(1) == num_available_cpus()


def test_counting_gpus_needs_no_library():
    assert devices.count_gpus() >= 0


@pytest.mark.parametrize(("error", "warned"), [(0, False), (100, False), (999, True)])
def test_a_driver_that_fails_is_warned_of(monkeypatch, caplog, error, warned):
    driver = SimpleNamespace(cuInit=lambda flags: error, cuDeviceGetCount=lambda count: 0)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: driver)
    assert devices.count_gpus.__wrapped__() == 0
    assert ("the CUDA driver fails with error 999: models run on the CPU" in caplog.text) is warned
