"""What a closed version leaves behind."""

import subprocess
import sys

FRAGMENTED = """
import numpy as np
from pathlib import Path
from serving.models.closing import return_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

blocks = [np.ones(64_000, np.uint8) for _ in range(2_000)]
kept = blocks[::100]  # lie between the others, so that the heap cannot shrink at its end
full = resident_mb()
del blocks
freed = resident_mb()
return_memory()
print(full - freed, full - resident_mb())
"""


def test_memory_between_blocks_that_others_hold_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True)
    by_itself, returned = map(float, done.stdout.split())
    assert by_itself < 30
    assert returned > 90
