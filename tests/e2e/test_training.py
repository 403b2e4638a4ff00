"""Whole training runs on real images, in real processes, as a user starts them."""

import functools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, clean_environment
from trainer.cli import train_command
from trainer.files import locked
from trainer.paths import LOCK_FILE

pytestmark = pytest.mark.slow

RunTrainer = Callable[..., "subprocess.CompletedProcess[str]"]
Command = Callable[..., list[str]]


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@contextmanager
def started(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Starts a command in a process group of its own, and kills the group at the end."""
    process = subprocess.Popen(
        command,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_for_line(process: "subprocess.Popen[str]", pattern: str) -> str:
    """Returns the next line with this pattern. Prints the lines before it, which pytest shows if the test fails."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if re.search(pattern, line):
            return line
    raise AssertionError(f"the process ended without a line like {pattern!r}")


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """Returns the trainer's processes below a torchrun, in the order of their starts (that of their ranks)."""
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(child) for children in lists for child in children.read_text().split()]


def train_here(capsys: pytest.CaptureFixture[str], *arguments: str, data_dir: Path) -> tuple[int, str, str]:
    """Trains on `mnist-mini` by a command line in this process. Returns its exit code, output and errors."""
    capsys.readouterr()
    known = ["--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", "--no-export"]
    with pytest.raises(SystemExit) as left:
        train_command([*known, *arguments])
    assert isinstance(left.value.code, int)
    return left.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


TWO_EPOCHS = ("--epochs", "2", "--precision", "float32")
EACH_WORLD_SIZE = pytest.mark.parametrize("ranks", [1, 2, 4])


@pytest.fixture(scope="module")
def finished(runs: Path, run_trainer: RunTrainer) -> Callable[[int], tuple[Path, str]]:
    """The folder and the output of a run of two epochs, by its number of ranks."""

    @functools.cache
    def run(ranks: int) -> tuple[Path, str]:
        folder = runs / f"ranks-{ranks}"
        done = run_trainer(*TWO_EPOCHS, "--run-dir", str(folder), ranks=ranks)
        assert done.returncode == 0, done.stderr
        return folder, done.stdout

    return run


@EACH_WORLD_SIZE
def test_a_run_leaves_a_complete_folder(ranks: int, finished: Callable[[int], tuple[Path, str]]) -> None:
    folder, output = finished(ranks)
    result = result_of(folder)
    assert result["world_size"] == ranks
    assert result["recipe"] == "mnist"
    assert result["dataset"] == "mnist-mini"
    assert result["num_parameters"] == 105_506
    assert result["steps"] == 90
    assert result["num_test"] == 1000
    assert result["test_accuracy"] == pytest.approx(1 - result["test_errors"] / 1000)
    assert result["test_accuracy"] > 0.85
    assert result["exported"] is None
    assert re.fullmatch("[0-9a-f]{64}", result["weights_sha256"])
    assert re.fullmatch("[0-9a-f]{64}", result["dataset_sha256"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2]
    assert any((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "report.html").stat().st_size > 10_000
    assert any((folder / "checkpoints").glob("step-*/manifest.json"))
    assert f"{ranks} rank{'s' if ranks > 1 else ''} on cpu" in output


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_number_of_ranks_changes_nothing_but_rounding(
    ranks: int, finished: Callable[[int], tuple[Path, str]]
) -> None:
    alone, here = ((finished(number)[0] / "metrics.jsonl").read_text().splitlines() for number in (1, ranks))
    for a, b in zip(map(json.loads, alone), map(json.loads, here), strict=True):
        for name in ("loss", "train_loss", "accuracy", "train_accuracy"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=0.02), (a, b)


@EACH_WORLD_SIZE
def test_the_evaluation_on_test_images_is_in_the_ledger(
    ranks: int, finished: Callable[[int], tuple[Path, str]], runs: Path
) -> None:
    folder, _ = finished(ranks)
    entries = [json.loads(line) for line in (runs / "ledger.jsonl").read_text().splitlines()]
    result = result_of(folder)
    mine = [entry for entry in entries if entry["weights_sha256"] == result["weights_sha256"]]
    assert [entry["num_errors"] for entry in mine] == [result["test_errors"]]


def test_ranks_do_not_train_a_complete_run_again(
    run_trainer: RunTrainer, finished: Callable[[int], tuple[Path, str]]
) -> None:
    """Neither does one process: see `test_the_folder_of_another_run_is_refused`."""
    folder, _ = finished(2)
    before = (folder / "result.json").read_bytes()
    done = run_trainer(*TWO_EPOCHS, "--run-dir", str(folder), ranks=2)
    assert done.returncode == 0
    assert done.stdout.count(f"{folder} is complete; nothing to do.") == 1
    assert (folder / "result.json").read_bytes() == before


DISTURBED = ("--epochs", "3", "--global-batch-size", "70")


@pytest.fixture(scope="module")
def undisturbed(runs: Path, run_trainer: RunTrainer) -> Callable[[int], str]:
    """The digest of the weights of an uninterrupted run, by its number of ranks."""

    @functools.cache
    def digest(ranks: int) -> str:
        folder = runs / f"undisturbed-{ranks}"
        done = run_trainer(*DISTURBED, "--run-dir", str(folder), ranks=ranks)
        assert done.returncode == 0, done.stderr
        return str(result_of(folder)["weights_sha256"])

    return digest


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.minutes), 2])
def test_a_killed_and_restarted_run_ends_in_the_same_weights(
    ranks: int, tmp_path: Path, trainer_command: Command, run_trainer: RunTrainer, undisturbed: Callable[[int], str]
) -> None:
    """All processes are killed without warning after the first epoch; then the same command runs again."""
    folder = tmp_path / "killed"
    arguments = [*DISTURBED, "--run-dir", str(folder)]
    with started(trainer_command(*arguments, ranks=ranks)) as process:
        wait_for_line(process, "epoch 1/3")
        os.killpg(process.pid, signal.SIGKILL)
    assert not (folder / "result.json").exists()
    again = run_trainer(*arguments, ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert result_of(folder)["weights_sha256"] == undisturbed(ranks)


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_the_run_and_it_continues_from_there(
    number: signal.Signals,
    ranks: int,
    tmp_path: Path,
    trainer_command: Command,
    run_trainer: RunTrainer,
    undisturbed: Callable[[int], str],
) -> None:
    folder = tmp_path / "stopped"
    arguments = [*DISTURBED, "--run-dir", str(folder)]
    with started(trainer_command(*arguments, ranks=ranks)) as process:
        wait_for_line(process, "epoch 1/3")
        targets = [process.pid] if ranks == 1 else ranks_of(process)
        for pid in targets:
            os.kill(pid, number)
        line = wait_for_line(process, "saved at step")
        code = process.wait(timeout=30)
    assert line.startswith(number.name)
    assert code == (128 + number if ranks == 1 else 1)  # torchrun has its own code
    step = int(re.search(r"saved at step (\d+)", line).group(1))  # type: ignore[union-attr]
    assert (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    again = run_trainer(*arguments, ranks=ranks)
    assert f"at step {step} of" in again.stdout
    assert again.returncode == 0
    assert result_of(folder)["weights_sha256"] == undisturbed(ranks)


def test_a_second_process_waits_for_the_run_folder_and_continues_the_run(
    tmp_path: Path, trainer_command: Command
) -> None:
    command = trainer_command("--epochs", "1000", "--run-dir", str(tmp_path / "run"))
    with started(command) as first:
        wait_for_line(first, "epoch 1/1000")
        with started(command) as second:
            wait_for_line(second, f"^{re.escape(str(tmp_path / 'run'))} is in use by another process: waiting")
            os.kill(first.pid, signal.SIGTERM)
            step = re.search(r"saved at step (\d+)", wait_for_line(first, "saved at step"))
            assert step is not None
            wait_for_line(second, f"at step {step.group(1)} of")


def test_a_process_that_waits_for_a_folder_writes_nothing_to_it(tmp_path: Path, trainer_command: Command) -> None:
    """The process that holds the lock may be about to start another run."""
    folder = tmp_path / "run"
    folder.mkdir()
    command = trainer_command("--epochs", "1", "--run-dir", str(folder))
    with locked(folder / LOCK_FILE, print, ""), started(command) as process:
        wait_for_line(process, "is in use by another process: waiting")
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_when_a_rank_is_killed_the_others_exit_with_one_error(tmp_path: Path, trainer_command: Command) -> None:
    """They wait for it in the backward pass, as gradients are added up by DDP."""
    options = ("--epochs", "1000", "--gradient-reduction", "ddp")
    command = trainer_command(*options, "--run-dir", str(tmp_path / "run"), ranks=4)
    with started(command) as process:
        wait_for_line(process, "epoch 1/1000")
        os.kill(ranks_of(process)[2], signal.SIGKILL)
        killed_at = time.monotonic()
        assert process.stdout is not None
        output = process.stdout.read()
        code = process.wait(timeout=30)
        seconds = time.monotonic() - killed_at
    assert code != 0
    assert seconds < 10
    assert len(re.findall("^error: .*lost another rank", output, re.MULTILINE)) == 1
    assert "SIGKILL" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(
    ranks: int, tmp_path: Path, run_trainer: RunTrainer
) -> None:
    done = run_trainer("--lr-scale", "1e12", "--run-dir", str(tmp_path / "run"), ranks=ranks)
    assert done.returncode == (5 if ranks == 1 else 1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(r"the loss is (nan|inf) at step \d+", errors[0])
    assert "no checkpoint had been saved yet" in errors[0]
    assert not (tmp_path / "run" / "result.json").exists()


def test_weights_that_diverged_in_the_last_step_are_not_evaluated_on_test_images(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the validation loss shows it."""
    arguments = ("--global-batch-size", "4500", "--lr-scale", "1e30", "--run-dir", str(tmp_path / "run"))
    code, _, errors = train_here(capsys, "--epochs", "1", *arguments, data_dir=data_dir)
    assert code == 5
    assert re.search(
        r"^error: training diverged: after epoch 1, the network's outputs for [\d,]+ of 500 images", errors, re.M
    )
    assert not (tmp_path / "ledger.jsonl").exists()


MISTAKES = {
    "unknown recipe": (["--recipe", "mnits"], "no recipe 'mnits': did you mean mnist"),
    "unknown data set": (["--dataset", "mnist-mimi"], "did you mean mnist-mini"),
    "no epochs": (["--epochs", "0"], "--epochs 0: must be at least 1"),
    "no such folder": (["--dataset", "folder:/nowhere"], "/nowhere"),
    "no GPU": (["--device", "cuda"], "no CUDA device"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_users_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    folder = tmp_path / "run"
    code, printed, errors = train_here(capsys, "--run-dir", str(folder), *arguments, data_dir=data_dir)
    assert code in (2, 3)
    assert printed == ""
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert not folder.exists()


def test_more_ranks_than_images_in_a_step_are_refused_once(tmp_path: Path, run_trainer: RunTrainer) -> None:
    done = run_trainer("--global-batch-size", "1", "--run-dir", str(tmp_path / "run"), ranks=2)
    assert done.returncode == 1
    assert done.stderr.count("error: 2 ranks for a global batch of 1") == 1


def test_the_folder_of_another_run_is_refused(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def train(*arguments: str) -> tuple[int, str, str]:
        return train_here(capsys, "--epochs", "1", "--run-dir", str(folder), *arguments, data_dir=data_dir)

    assert train()[0] == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for change, named in ((["--epochs", "2"], "recipe.epochs is 1, not 2"), (["--seed", "3"], "seed is 0, not 3")):
        code, printed, errors = train(*change)
        assert (code, printed) == (2, "")  # before anything is built or printed
        assert named in errors
    assert train("--resume", "never")[:2] == (2, "")
    assert train() == (0, f"{folder} is complete; nothing to do. Its report: {folder}/report.html\n", "")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path, run_trainer: RunTrainer) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = run_trainer("--run-dir", str(tmp_path / "file" / "run"))
    assert done.returncode == 4
    assert done.stderr.startswith("error: cannot write ")
    assert done.stderr.count("\n") == 1


def test_a_terminal_gets_a_bar_and_no_plain_progress_lines(tmp_path: Path, trainer_command: Command) -> None:
    terminal, child = pty.openpty()
    process = subprocess.Popen(
        trainer_command("--epochs", "3", "--run-dir", str(tmp_path / "run")),
        env={**clean_environment(), "TERM": "xterm-256color", "COLUMNS": "140"},
        stdout=child,
        stderr=child,
    )
    os.close(child)
    seen = b""
    while process.poll() is None or select.select([terminal], [], [], 0)[0]:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # Linux: EIO once the other side is closed
            break
    os.close(terminal)
    text = seen.decode()
    assert process.wait() == 0
    assert "images/s" in text
    assert "/135" in text
    assert "epoch 3/3" in text
    assert "test accuracy" in text


def test_a_run_ends_with_a_version_in_the_model_repository(tmp_path: Path, run_trainer: RunTrainer) -> None:
    models, folder = tmp_path / "models", tmp_path / "run"
    arguments = ["--epochs", "1", "--run-dir", str(folder), "--export", "--model-repository", str(models)]
    # An exported model computes in float32: so must the run, for the accuracies to agree to the last image.
    done = run_trainer(*arguments, "--precision", "float32", ranks=2)
    assert done.returncode == 0, done.stderr
    version = models / "mnist" / "1"
    result = result_of(folder)
    assert result["exported"] == str(version)
    assert f"exported to {version}" in done.stdout
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["metrics"]["run"]["test_errors"] == result["test_errors"]
    assert manifest["metrics"]["val_accuracy"] == pytest.approx(result["val_accuracy"])
    assert manifest["origin"]["weights_sha256"] == result["weights_sha256"]
    assert "Warning" not in done.stderr


def test_a_run_whose_export_fails_is_complete_and_names_the_command_to_retry(
    tmp_path: Path, trainer_command: Command, run_trainer: RunTrainer, data_dir: Path
) -> None:
    """The repository is valid when the run begins, and becomes a file while it trains."""
    models, folder = tmp_path / "models", tmp_path / "run"
    arguments = ["--epochs", "2", "--run-dir", str(folder), "--export", "--model-repository", str(models)]
    with started(trainer_command(*arguments)) as process:
        wait_for_line(process, "epoch 1/2")
        models.write_text("")
        assert process.stdout is not None
        *_, last = process.stdout.read().splitlines()
        assert process.wait(timeout=30) == 6
    assert last.startswith("error: cannot write to the model repository")
    assert last.endswith(f"to retry: convoy export {folder} --model-repository {models}")
    assert result_of(folder)["exported"] is None
    assert (folder / "report.html").exists()
    models.unlink()
    verb = [sys.executable, "-m", "trainer", "export", str(folder), "--data-dir", str(data_dir), "--name", "digits"]
    done = subprocess.run(
        [*verb, "--model-repository", str(models)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (models / "digits" / "1" / "manifest.json").exists()


def test_a_run_that_cannot_be_exported_does_not_start(tmp_path: Path, run_trainer: RunTrainer) -> None:
    folder = tmp_path / "models" / "mnist"
    folder.mkdir(parents=True)
    (folder / "labels.txt").write_text("cat\ndog\n")
    done = run_trainer("--export", "--model-repository", str(tmp_path / "models"), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*labels\.txt has 2 classes, the new version 10: .*--no-export.*\n", done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_to_the_end_and_exit(tmp_path: Path, trainer_command: Command) -> None:
    """NCCL's communicator cannot close while a CUDA graph uses it."""
    command = ["cuda" if word == "cpu" else word for word in trainer_command("--epochs", "2", ranks=2)]
    command += ["--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "no CUDA graph" not in done.stdout
    assert result_of(tmp_path / "run")["test_accuracy"] > 0.85
