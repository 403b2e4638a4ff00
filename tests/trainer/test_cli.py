"""Errors are one line and an exit code; Ctrl-C and closed outputs are quiet."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, clean_environment
from trainer import cli
from trainer.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    Interrupted,
    PeerError,
    TrainerError,
    UserCodeError,
)


def leave_with(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run_command(command)
    assert isinstance(left.value.code, int)
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"),
    [(TrainerError, 1), (ConfigError, 2), (DataError, 3), (CheckpointError, 4), (DivergenceError, 5)],
)
def test_an_error_is_one_line_with_its_code(
    kind: type[TrainerError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave_with(kind("what was wrong: what to do"), capsys) == (code, "error: what was wrong: what to do\n")


def test_a_line_break_in_a_name_makes_no_second_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (ConfigError("a\nb does not exist"), FileNotFoundError(errno.ENOENT, "does not exist", "a\nb")):
        printed = leave_with(error, capsys)[1]
        assert printed.startswith("error: a\N{REPLACEMENT CHARACTER}b")
        assert printed.count("\n") == 1
    assert leave_with(UserCodeError("net.py, line 2\n  1 / 0"), capsys)[1] == "error: net.py, line 2\n  1 / 0\n"
    with pytest.raises(SystemExit, match="2"):
        cli.train_command(["--config", "no\nsuch.toml"])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "runs/of-ada/config.json")
    assert leave_with(error, capsys) == (1, "error: runs/of-ada/config.json: Permission denied\n")
    assert leave_with(OSError(errno.ENOSPC, "No space left on device"), capsys)[1] == "error: No space left on device\n"
    assert "Traceback" in leave_with(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), capsys)[1]


@pytest.mark.parametrize("size", [10**15, 2**63 - 1])
def test_a_lack_of_memory_is_one_line(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        torch.empty(size, dtype=torch.float32)

    with pytest.raises(SystemExit, match="2"):
        cli.run_command(command)
    line = capsys.readouterr().err
    assert line.startswith("error: not enough memory: ask for a smaller batch, smaller images or a smaller network (")
    assert line.count("\n") == 1


def test_an_interrupted_run_reports_what_it_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave_with(Interrupted("SIGTERM", "saved", 15), capsys) == (143, "SIGTERM: saved\n")
    assert leave_with(KeyboardInterrupt(), capsys) == (130, "")


def test_a_rank_that_failed_after_another_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LINGER_S", 0.0)
    assert leave_with(PeerError("another rank failed first"), capsys) == (1, "")


def test_a_defect_prints_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = leave_with(ZeroDivisionError("boom"), capsys)
    assert code == 1
    assert "Traceback" in printed
    assert "ZeroDivisionError: boom" in printed


def test_a_commands_return_value_is_the_exit_code() -> None:
    for result, code in ((None, 0), (3, 3)):
        with pytest.raises(SystemExit) as left:
            cli.run_command(lambda result=result: result)  # type: ignore[misc]
        assert left.value.code == code


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "usage: python -m trainer VERB"),
        (["--help"], 0, "recipes"),
        (["fly"], 2, "error: no verb 'fly'"),
        (["recipes"], 0, "mnist"),
        (["recipes", "--help"], 0, "usage"),
        (["evaluate", "--help"], 0, "--split"),
        (["export", "--help"], 0, "--model-repository"),
        (["train", "--help"], 0, "--global-batch-size"),
        (["train", "--help"], 0, "--no-export"),
        (["train", "--epoch", "3"], 2, "--epochs"),
        (["data", "list", "--help"], 0, "folder:PATH"),
    ],
)
def test_every_verb_has_help(arguments: list[str], code: int, text: str) -> None:
    command = [sys.executable, "-m", "trainer", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--log-to", "foo"],
            "invalid choice 'foo' for argument '--log-to'. Expected one of ('",
        ),
        (
            ["--epochs", "abc"],
            "--epochs: expected a whole number, got 'abc': see ",
        ),
        (["--epoch", "3"], "unrecognized options: --epoch, 3: did you mean --epochs?"),
        (["--run-dir"], "--run-dir needs a value: see trainer/main.py --help"),
    ],
)
def test_a_faulty_option_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.train_command(arguments)
    printed = capsys.readouterr()
    assert (left.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith(f"error: {line}")


def test_the_list_of_studies_waits_for_no_import_of_torch() -> None:
    code = "from trainer.cli import *; study_command(['--help'], ''); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["data", "list"], ["train", "--help"]])
def test_a_closed_pipe_ends_it_quietly(arguments: list[str], unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trainer", *arguments]
    environment = clean_environment() | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["data", "list"], ["train", "--help"]])
def test_a_full_disk_is_one_line(arguments: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "trainer", *arguments]
    environment = clean_environment() | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
    line = b"error: cannot write the output (No space left on device)\n"
    assert (done.returncode, done.stderr) == (141, line)


@pytest.mark.parametrize(("code", "printed"), [(0, "cleaned up\n"), (3, "")])
def test_a_rank_that_succeeded_leaves_as_other_commands_do(code: int, printed: str) -> None:
    """wandb left its temporary folders."""
    script = (
        "import atexit; from convoy.processes import whole_command; from trainer.cli import run_command\n"
        f"with whole_command(): atexit.register(print, 'cleaned up'); run_command(lambda: {code})"
    )
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment = clean_environment() | rank | master | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")


def test_an_error_that_cannot_be_printed_keeps_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "compare", str(tmp_path)]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, check=False).returncode == 2
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    assert subprocess.run(closed, cwd=ROOT, check=False).returncode == 2


# An import that runs in C turns KeyboardInterrupt into another exception.
TORCH = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("torch failed to import")
"""


@pytest.mark.parametrize(
    "command", [["trainer/main.py"], ["-m", "trainer", "evaluate", "run"], ["-m", "trainer.launch"]]
)
def test_ctrl_c_while_torch_is_imported_is_quiet(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed, errors) == (130, b"", b"")


SLOW_TEARDOWN = """
import atexit, time
from trainer.cli import run_command

def tear_down():
    print("tearing down", flush=True)
    time.sleep(60)

atexit.register(tear_down)
run_command(lambda: print("done"))
"""


def test_ctrl_c_after_the_end_of_a_command_is_quiet() -> None:
    command = [sys.executable, "-c", SLOW_TEARDOWN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["done\n", "tearing down\n"]
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130
