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


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["serving", "--model-repository", "models"], 0),
        (["trainer.launch", "-m", "trainer.main"], 143),
        (["trainer.service"], 143),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_sigterm_during_imports_ends_the_first_process_of_a_container(
    command: list[str], code: int, tmp_path: Path
) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if os.geteuid() != 0 or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may start a process as the first of a container")
    for library in ("numpy", "torch", "grpc"):
        (tmp_path / f"{library}.py").write_text(NUMPY)
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    words = [*unshare, sys.executable, "-m", *command]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        try:
            assert process.wait(timeout=30) == code
        finally:
            process.kill()


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
        "import os; from convoy.processes import whole_command\nwith whole_command(): print(os.fsdecode(b'caf\\xe9'))"
    )
    environment = clean_environment() | {"PYTHONIOENCODING": f"{encoding}:strict"}
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert output.stdout == b"caf\\udce9\n"


ENDS = """
import atexit, logging, sys, threading
from convoy.processes import whole_command

class Kept:
    def __del__(self):
        print("teardown", flush=True)

kept = Kept()

def work():
    threading.Event().wait(0.2)
    print("thread")

with whole_command():
    handler = logging.StreamHandler(sys.stdout)
    handler.close = lambda: print("logging")
    atexit.register(print, "atexit")
    threading.Thread(target=work).start()
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit(-1)", 255), ("sys.exit('error: x')", 1)],
)
def test_a_command_ends_without_teardown_but_with_all_else(end: str, code: int) -> None:
    command = [sys.executable, "-c", ENDS.format(end=end)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "thread\natexit\nlogging\n")
    assert done.stderr == ("error: x\n" if code == 1 else "")


def test_an_error_that_nobody_catches_has_its_traceback_and_code() -> None:
    command = [sys.executable, "-c", ENDS.format(end="raise ValueError('lost')")]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ValueError: lost")
