"""Tests of command lines in forks of an interpreter."""

import time
from pathlib import Path

import pytest

from tests.conftest import clean_environment
from tests.interpreter import Interpreter

SCRIPT = """
import os, sys
print(sys.argv[1:], os.environ.get("COLOUR"), os.getcwd(), sys.path[0], repr(sys.stdin.read()), __name__, flush=True)
print("torch" in sys.modules, file=sys.stderr)
if len(sys.argv) > 1:
    os.kill(os.getpid(), int(sys.argv[1]))
sys.exit(7)
"""


def test_a_fork_is_as_a_python_of_its_own(interpreter: Interpreter, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (folder := tmp_path / "folder").mkdir()
    done = interpreter.run([str(script)], env=clean_environment() | {"COLOUR": "red"}, cwd=folder)
    assert (done.returncode, done.stderr) == (7, "True\n")
    assert done.stdout == f"[] red {folder} {tmp_path} '' __main__\n"
    again = interpreter.run(["-m", "script", "9"], env=clean_environment(), cwd=tmp_path)
    assert (again.returncode, again.stderr) == (-9, "True\n")
    assert again.stdout == f"['9'] None {tmp_path} {tmp_path} '' __main__\n"


def test_a_fork_that_takes_too_long_is_killed_with_its_children(interpreter: Interpreter, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import subprocess\nsubprocess.run(['sleep', '60'])\n")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        interpreter.run([str(script)], env=clean_environment(), timeout_s=0.5)
    assert time.monotonic() - began < 30
    script.write_text("print('next')\n")
    assert interpreter.run([str(script)], env=clean_environment()).stdout == "next\n"
