"""Where instances go, by what the configuration wants and what the operator allows."""

import pytest

from serving.errors import LoadError
from serving.models import devices
from serving.models.devices import InstanceGroup, assign_devices


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
def test_placement(num_gpus, groups, device, gpus, expected):
    num_gpus(gpus)
    assert assign_devices(groups, device) == expected


@pytest.mark.parametrize(
    ("group", "device", "gpus", "reason"),
    [
        (InstanceGroup("gpu"), "auto", 0, "asks for a GPU, and there are 0 GPUs"),
        (InstanceGroup("gpu", 1, (0, 2)), "auto", 2, "asks for GPU 2, and there are 2 GPUs"),
        (InstanceGroup("gpu"), "cpu", 4, "the server was started with --device cpu"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(num_gpus, group, device, gpus, reason):
    num_gpus(gpus)
    with pytest.raises(LoadError, match=reason):
        assign_devices([group], device)


def test_counting_gpus_needs_no_library():
    assert devices.count_gpus() >= 0
