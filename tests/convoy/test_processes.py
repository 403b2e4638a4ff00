"""The server's and the client's command lines end quietly on Ctrl-C and on closed or full outputs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment

# As for imports implemented in C, KeyboardInterrupt surfaces as another exception.
NUMPY = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("numpy failed to import")
"""


@pytest.mark.parametrize(
    "command", [["serving", "--model-repository", "models"], ["serving.client", "status"]], ids=["server", "client"]
)
def test_ctrl_c_during_imports_is_quiet(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text(NUMPY)
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, b"", b"")


def test_a_closed_pipe_ends_the_server_s_help_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "serving", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_reported_in_one_line() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "serving.client", "--help"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 141
    assert done.stderr == b"error: cannot write the output (No space left on device)\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_cannot_be_encoded_are_written_with_escapes(encoding: str) -> None:
    script = (
        "import os; from convoy.processes import exit_on_broken_pipe\n"
        "with exit_on_broken_pipe(): print(os.fsdecode(b'caf\\xe9'))"
    )
    environment = clean_environment() | {"PYTHONIOENCODING": f"{encoding}:strict"}
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert output.stdout == b"caf\\udce9\n"
