"""Reuse of memory, its return to the system, and the number of heaps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convoy.cpus import num_available_cpus

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")

# The first convolution allocates more than 32 MB, which glibc always maps afresh; for less, it depends.
COUNT_FAULTS = """
import resource, sys, torch
from convoy.allocator import keep_freed_memory
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

FRAGMENTED = """
import numpy as np
from pathlib import Path
from convoy.allocator import return_freed_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

blocks = [np.ones(64_000, np.uint8) for _ in range(2_000)]
kept = blocks[::100]  # lie between the others, so that the heap cannot shrink at its end
full = resident_mb()
del blocks
freed = resident_mb()
return_freed_memory()
print(full - freed, full - resident_mb())
"""

COUNT_HEAPS = """
import ctypes, sys, threading
from pathlib import Path
from convoy.allocator import limit_arenas

limit_arenas()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
at_once = threading.Barrier(40, timeout=60)

def allocate():
    at_once.wait()
    libc.malloc(100)
    at_once.wait()

threads = [threading.Thread(target=allocate) for _ in range(40)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
print(Path(sys.argv[1]).read_text().count("<heap nr="))
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    plain = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    return subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True).stdout


def test_freed_memory_is_used_again_without_page_faults() -> None:
    faults = {mode: int(run(COUNT_FAULTS, mode)) for mode in ("keep", "leave")}
    assert faults["keep"] < faults["leave"] / 4, faults


def test_memory_between_blocks_that_others_hold_goes_back_to_the_system() -> None:
    by_itself, returned = map(float, run(FRAGMENTED).split())
    assert by_itself < 30
    assert returned > 90


@pytest.mark.parametrize(
    ("environment", "num_heaps"),
    [
        ({}, 2 * num_available_cpus()),
        ({"MALLOC_ARENA_MAX": "3"}, 3),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}, 3),
    ],
)
def test_threads_share_two_heaps_a_cpu(tmp_path: Path, environment: dict[str, str], num_heaps: int) -> None:
    assert int(run(COUNT_HEAPS, str(tmp_path / "heaps.xml"), **environment)) == num_heaps
