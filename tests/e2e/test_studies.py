"""Runs studies as a user does: as one process, under torchrun, and interrupted."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, clean_environment
from tests.e2e.test_training import started, wait_for_line
from tests.interpreter import Interpreter
from trainer.cli import study_command

pytestmark = pytest.mark.slow

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*arguments: str, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), "-m", "trainer", "study", *arguments]


@pytest.fixture
def run(interpreter: Interpreter) -> Run:
    """A function that runs a study to its end."""

    def run(*arguments: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
        _, *words = command(*arguments, ranks=ranks)
        return interpreter.run(words, env=clean_environment(), cwd=ROOT, timeout_s=600)

    return run


def small(data_dir: Path, folder: Path) -> list[str]:
    known = ["--recipe", "mnist-lenet5", "--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu"]
    return [*known, "--run-dir", str(folder)]


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_ranks_share_the_seeds_and_the_results_match(tmp_path: Path, data_dir: Path, run: Run) -> None:
    found = []
    for ranks in (1, 2):
        folder = tmp_path / f"workspace-{ranks}" / "study"
        arguments = ["seeds", "--runs", "3", "--epochs", "1", "--stack", "1", *small(data_dir, folder)]
        done = run(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert f"report: {folder / 'report.html'}" in done.stdout
        found.append(result_of(folder)["test_errors_percent"])
        assert len((folder.parent / "ledger.jsonl").read_text().splitlines()) == 3
    # A rank has fewer threads than a single process, and therefore rounds differently.
    assert found[0] == pytest.approx(found[1], abs=1.0)


def test_a_signal_ends_a_study_and_the_same_command_continues_it(tmp_path: Path, data_dir: Path, run: Run) -> None:
    folder = tmp_path / "runs" / "study"
    arguments = ["seeds", "--runs", "3", "--epochs", "2", "--stack", "1", *small(data_dir, folder)]
    with started(command(*arguments)) as process:
        wait_for_line(process, "seed 0: test error")
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        process.stdout.read()
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert not (folder / "result.json").exists()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "of 3 seeds are done already" in done.stdout
    assert len(result_of(folder)["test_errors_percent"]) == 3


def test_a_study_whose_output_is_closed_names_the_command_to_continue(tmp_path: Path, data_dir: Path) -> None:
    folder = tmp_path / "runs" / "study"
    arguments = ["seeds", "--runs", "3", "--epochs", "1", "--stack", "1", *small(data_dir, folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(*arguments), cwd=ROOT, env=clean_environment(), text=True, **pipes) as process:
        wait_for_line(process, "seed 0: test error")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        message = process.stderr.read()
    assert (process.returncode, message) == (
        141,
        f"SIGPIPE: stopped; continue with the same command and --run-dir {folder}\n",
    )


def test_ranks_share_the_candidates_of_a_sweep(tmp_path: Path, data_dir: Path, run: Run) -> None:
    folder = tmp_path / "runs" / "study"
    arguments = ["sweep", "--grid", "lr_scale=0.5,1,2", "--epochs", "1", *small(data_dir, folder)]
    done = run(*arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert len(result_of(folder)["candidates"]) == 3
    assert not (tmp_path / "runs" / "ledger.jsonl").exists()


def test_ranks_share_the_networks_and_the_main_rank_writes_all_results(
    tmp_path: Path, data_dir: Path, run: Run
) -> None:
    arguments = ["capacity", "--repeats", "2", "--widths", "1", "2", "--num-images", "50", "--network-repeats", "1"]
    arguments += ["--epochs", "1", "--data-dir", str(data_dir), "--run-dir", str(tmp_path / "study")]
    done = run(*arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "study/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["width 1, repeat 0", "width 2, repeat 0"]


def test_wrong_options_are_errors_of_one_line(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prog = "python -m trainer study"
    assert study_command(["seed"], prog) == 2
    assert capsys.readouterr().err == "error: no study 'seed': did you mean seeds?\n"
    with pytest.raises(SystemExit, match="2"):
        study_command(["sweep", "--grid", "lr=1,2", *small(data_dir, tmp_path / "study")], prog)
    printed = capsys.readouterr().err
    assert printed.startswith("error: no field 'lr': did you mean param_groups.stem.lr")
    assert printed.count("\n") == 1
    assert study_command(["--help"], prog) == 0
    assert "regression" in capsys.readouterr().out
