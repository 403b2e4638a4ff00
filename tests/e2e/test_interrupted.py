"""Runs that are ended while they download or report, or whose output is closed: the same command completes them."""

import os
import pty
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, clean_environment, fill
from tests.e2e.test_training import result_of, started, wait_for_line

pytestmark = pytest.mark.slow

Command = Callable[..., list[str]]

# Two moments that a test can hit: a mirror that sends nothing, and a report that takes long.
SILENT_MIRROR = """
import dataclasses, sys
sys.path.insert(0, ROOT)
from trainer.data import datasets
from trainer.data.published.sources import Mirror
mirror = Mirror("http://127.0.0.1:PORT/", ("file",))
datasets.DATASETS["mnist"] = dataclasses.replace(datasets.MNIST, sources=(mirror,))
from trainer.cli import train_command
train_command(sys.argv[1:])
"""
SLOW_REPORT = """
import sys, time
sys.path.insert(0, ROOT)
import trainer.report.page
def write_report(*arguments):
    print("reporting", flush=True)
    time.sleep(60)
trainer.report.page.write_report = write_report
from trainer.cli import train_command
train_command(sys.argv[1:])
"""


def with_script(command: list[str], script: str, folder: Path) -> list[str]:
    """The command line with another main program."""
    path = folder / "main.py"
    path.write_text(script.replace("ROOT", repr(str(ROOT))))
    return [str(path) if part.endswith("trainer/main.py") else part for part in command]


def rest_of(process: "subprocess.Popen[str]") -> tuple[str, int]:
    assert process.stdout is not None
    return process.stdout.read(), process.wait(timeout=30)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_a_stalled_download(ranks: int, tmp_path: Path, trainer_command: Command) -> None:
    data_dir, run_dir = tmp_path / "data", tmp_path / "run"
    arguments = ["--dataset", "mnist", "--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        mirror.settimeout(100)
        script = SILENT_MIRROR.replace("PORT", str(mirror.getsockname()[1]))
        with started(with_script(trainer_command(*arguments, ranks=ranks), script, tmp_path)) as process:
            connection, _ = mirror.accept()
            with connection:
                connection.recv(1)
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to torchrun and all ranks
                printed, code = rest_of(process)
    assert printed.count("SIGINT: stopped") == 1
    assert "error:" not in printed
    assert code == 130 if ranks == 1 else code != 0  # torchrun has its own code
    assert not run_dir.exists()
    assert [path.name for path in data_dir.rglob("*") if path.is_file()] == ["mnist.lock"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.minutes), 2])
def test_sigterm_ends_a_slow_report(
    ranks: int,
    tmp_path: Path,
    trainer_command: Command,
    run_trainer: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--epochs", "1", "--run-dir", str(run_dir)]
    with started(with_script(trainer_command(*arguments, ranks=ranks), SLOW_REPORT, tmp_path)) as process:
        wait_for_line(process, "reporting")
        process.send_signal(signal.SIGTERM)
        printed, code = rest_of(process)
    assert printed.count("SIGTERM: stopped") == 1
    assert "error:" not in printed
    assert code == 143 if ranks == 1 else code != 0
    assert not (run_dir / "result.json").exists()
    again = run_trainer(*arguments, ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert result_of(run_dir)["test_look"] == 1
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.minutes), 2])
def test_closed_output_ends_a_training_that_is_continued_later(
    ranks: int,
    tmp_path: Path,
    trainer_command: Command,
    run_trainer: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    arguments = ["--epochs", "4", "--run-dir", str(tmp_path / "run")]
    command, pipes = trainer_command(*arguments, ranks=ranks), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=clean_environment(), text=True, **pipes) as process:
        wait_for_line(process, "run folder")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        printed = process.stderr.read()
        code = process.wait(timeout=60)
    assert printed.count("SIGPIPE: saved at step ") == 1
    # torchrun prints lines of its own.
    assert printed.count("\n") == 1 if ranks == 1 else "BrokenPipeError" not in printed
    assert code == 141 if ranks == 1 else code != 0
    again = run_trainer(*arguments, ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert "at step " in again.stdout
    assert result_of(tmp_path / "run")["steps"] == 180


def test_a_terminal_that_closes_ends_a_training_that_is_saved(tmp_path: Path, trainer_command: Command) -> None:
    """It sends SIGHUP, and the progress bar cannot be written any more."""
    command = trainer_command("--epochs", "300", "--run-dir", str(tmp_path / "run"), "--save-every-s", "600")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, clean_environment())
    try:
        printed = b""
        while b"epoch 1/300:" not in printed:
            printed += os.read(terminal, 4096)
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert max(steps) >= 45  # the first epoch's


def test_a_full_disk_under_the_log_ends_a_training_that_is_continued_later(
    tmp_path: Path,
    small_disk: Path,
    trainer_command: Command,
    run_trainer: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    arguments = ["--epochs", "4", "--run-dir", str(tmp_path / "run")]
    log, filler = small_disk / "log", fill(small_disk)
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - 4096)  # room for the first lines
    log.write_bytes(b" " * 3600)
    with log.open("ab") as out:
        command = trainer_command(*arguments)
        done = subprocess.run(
            command, env=clean_environment(), stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr.startswith("cannot write the output (No space left on device): saved at step ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 141
    again = run_trainer(*arguments)
    assert again.returncode == 0, again.stderr
    assert "at step " in again.stdout
    assert result_of(tmp_path / "run")["steps"] == 180


SLOW_NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = torch.nn.Linear(784, num_classes)

    def forward(self, images):
        if self.training:
            torch.cuda._sleep(600_000_000)  # some 0.3 s of a GPU
        return self.head(images.flatten(1))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_signal_is_heard_between_slow_steps_of_a_gpu(tmp_path: Path, trainer_command: Command) -> None:
    """The loop once queued an epoch of 15 s at once, and the grace period of 8 s ended the run without a checkpoint."""
    (tmp_path / "net.py").write_text(SLOW_NET)
    arguments = ["--network", f"{tmp_path / 'net.py'}:Net", "--run-dir", str(tmp_path / "run"), "--epochs", "3"]
    command = ["cuda" if word == "cpu" else word for word in trainer_command(*arguments)]
    with started(command) as process:
        wait_for_line(process, "  step ")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        printed, code = rest_of(process)
    assert code == 143, printed
    assert "SIGTERM: saved at step " in printed
    assert time.monotonic() - began < 8
