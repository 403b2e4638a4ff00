"""Reuse of memory, and the description of the machine."""

import subprocess
import sys

import pytest
import torch

from convoy.cpus import available_memory, num_available_cpus
from trainer.hardware import describe

# The first convolution allocates more than 32 MB, which glibc always maps afresh; for less, it depends.
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
    assert described["memory_bytes"] == available_memory()
    assert described["torch"] == torch.__version__
    assert described["device"]
