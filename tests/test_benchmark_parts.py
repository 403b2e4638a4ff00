"""A benchmark that is cut off keeps what it has measured."""

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import time
from parts import Parts

parts, found = Parts(60), []
for name in ("quick", "faulty", "slow", "later"):
    if not parts.is_over:
        with parts.part(name):
            if name == "faulty":
                raise ValueError("no such kernel")
            print(name, flush=True)
            time.sleep(60 if name == "slow" else 0)
            found.append(name)
print(found, parts.left_out)
"""


def test_a_part_that_fails_or_is_cut_off_ends_no_other() -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [next(process.stdout) for _ in range(2)] == ["quick\n", "slow\n"]
        process.terminate()
        left_out = {"faulty": "no such kernel", "slow": "the time was over (SIGTERM)"}
        assert process.stdout.read() == f"{['quick']} {left_out}\n"
    assert process.returncode == 0
