"""Finished runs opened again, alone and under torchrun: the same whole numbers for every number of ranks."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment
from tests.interpreter import Interpreter
from trainer.config import EvaluateConfig, ExportConfig
from trainer.errors import CheckpointError, Interrupted
from trainer.export import pipeline
from trainer.reopen import evaluate_run, export_run

RunTrainer = Callable[..., "subprocess.CompletedProcess[str]"]
Evaluate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, run_trainer: RunTrainer) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = run_trainer("--epochs", "1", "--save-every-steps", "20", "--run-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def evaluate(interpreter: Interpreter, data_dir: Path) -> Evaluate:
    """A function that evaluates a run by its command line."""

    def evaluate(folder: Path, *arguments: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        verb = ["-m", "trainer", "evaluate", str(folder), "--data-dir", str(data_dir), "--device", "cpu"]
        return interpreter.run([*launcher, *verb, *arguments], env=clean_environment(), cwd=ROOT, timeout_s=120)

    return evaluate


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_validation_is_the_same_number_for_every_world_size(ranks: int, run_folder: Path, evaluate: Evaluate) -> None:
    done = evaluate(run_folder, ranks=ranks)
    assert done.returncode == 0, done.stderr
    about, _ = done.stdout.splitlines()
    on = "1 rank on cpu" if ranks == 1 else f"{ranks} ranks on cpu"
    assert re.fullmatch(rf"{run_folder} at step 45 of 45: mnist on mnist-mini, 105,506 parameters; \w+, {on}", about)
    found = re.search(r"validation accuracy .* \((\d+) of 500 wrong", done.stdout)
    assert found is not None, done.stdout
    expected = json.loads((run_folder / "result.json").read_text())["val_accuracy"]
    assert 1 - int(found.group(1)) / 500 == pytest.approx(expected)


@pytest.mark.slow
def test_a_second_evaluation_on_the_test_set_is_read_from_the_ledger(run_folder: Path, evaluate: Evaluate) -> None:
    ledger = run_folder.parent / "ledger.jsonl"
    before = ledger.read_text()
    done = evaluate(run_folder, "--split", "test")
    assert done.returncode == 0, done.stderr
    errors = json.loads((run_folder / "result.json").read_text())["test_errors"]
    assert f"({errors} of 1,000 wrong" in done.stdout
    assert "recorded earlier" in done.stdout
    assert ledger.read_text() == before


def test_sigterm_ends_an_export_as_ctrl_c_does(
    run_folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left a version's unfinished files in the repository."""
    monkeypatch.setattr(pipeline, "export", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted, match="SIGTERM: stopped"):
            export_run(ExportConfig(run=run_folder, data_dir=data_dir, device="cpu"))
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_folder_without_a_run_is_one_line(tmp_path: Path, evaluate: Evaluate) -> None:
    done = evaluate(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_run_of_a_later_version_is_one_line(tmp_path: Path) -> None:
    values = {"recipe": {"name": "mnist", "dataset": "mnist-mini", "blur": 1}, "seed": 0, "image_size": None}
    (tmp_path / "config.json").write_text(json.dumps({"fingerprint": values, "started_with": {}}))
    with pytest.raises(
        CheckpointError, match=r"config\.json is damaged: Recipe has no blur in this version; a later one"
    ):
        evaluate_run(EvaluateConfig(run=tmp_path, device="cpu"))


def test_weights_that_are_not_those_of_the_result_are_refused(
    run_folder: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    """A damaged last checkpoint must not lend its figures to the one before it."""
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    newest = max((folder / "checkpoints").glob("step-*"))
    (newest / "state.pt").write_bytes(b"damaged")
    assert len(list((folder / "checkpoints").glob("step-*"))) > 1
    done = evaluate(folder, "--split", "test")
    assert done.returncode == 4
    assert "its last checkpoint is damaged or gone" in done.stderr
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_complete_run_without_a_good_checkpoint_is_not_called_untrained(
    run_folder: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        (checkpoint / "state.pt").write_bytes(b"damaged")
    done = evaluate(folder)
    assert done.returncode == 4
    assert "run is complete, but has no good checkpoint any more" in done.stderr
