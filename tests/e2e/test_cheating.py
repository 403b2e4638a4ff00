"""The lecture's five ways of cheating (page 57), tried through the public interface: each fails or is recorded.

"From bad to are you kidding": early stopping on the evaluation, over-tuning of meta-parameters, data-set selection,
clauses for one data set, seed selection.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, clean_environment
from tests.interpreter import Interpreter
from trainer.config import TrainConfig
from trainer.evaluation.intervals import simultaneous_interval

pytestmark = pytest.mark.minutes
RunTrainer = Callable[..., "subprocess.CompletedProcess[str]"]
Verb = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def verb(interpreter: Interpreter) -> Verb:
    """A function that runs a verb of the trainer by its command line."""
    return lambda *arguments: interpreter.run(["-m", "trainer", *arguments], env=clean_environment(), cwd=ROOT)


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def ledger_entries(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "ledger.jsonl").read_text().splitlines()]


def is_widened(result: dict[str, Any], number: int) -> bool:
    """Returns whether the interval is that of this evaluation."""
    num_right = result["num_test"] - result["test_errors"]
    return result["test_interval"] == pytest.approx(simultaneous_interval(num_right, result["num_test"], number))


def page_of(folder: Path) -> str:
    """The report's source on one line."""
    return " ".join((folder / "report.html").read_text().split())


def train_in(runs: Path, run_trainer: RunTrainer, name: str, *arguments: str, ranks: int = 1) -> Path:
    """A run of one epoch in that workspace."""
    done = run_trainer("--epochs", "1", "--run-dir", str(runs / name), *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return runs / name


@pytest.fixture
def train(tmp_path: Path, run_trainer: RunTrainer) -> Callable[..., Path]:
    """A run of one epoch in this test's workspace."""
    return partial(train_in, tmp_path / "runs", run_trainer)


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory, run_trainer: RunTrainer) -> Path:
    """A workspace with runs of three seeds."""
    runs = tmp_path_factory.mktemp("seeds") / "runs"
    for seed in range(3):
        train_in(runs, run_trainer, f"seed-{seed}", "--seed", str(seed))
    return runs


@pytest.fixture
def runs(three_seeds: Path, tmp_path: Path) -> Path:
    """The same in this test's workspace: `seed-0`, `seed-1`, `seed-2` and their ledger."""
    return Path(shutil.copytree(three_seeds, tmp_path / "runs"))


def test_early_stopping_on_the_evaluation(train: Callable[..., Path]) -> None:
    """Train one epoch, two, three, evaluate on the test set each time, keep the best: each evaluation counts."""
    folders = [train(f"stop-{epochs}", "--epochs", str(epochs)) for epochs in (1, 2, 3)]
    results = [result_of(folder) for folder in folders]
    assert [result["test_look"] for result in results] == [1, 2, 3]
    assert is_widened(results[2], 3)
    assert "This was evaluation 3 of 3 on this test set" in page_of(folders[2])
    # A run that still trains has no test accuracy to stop by: its log has validation only.
    *lines, last = [json.loads(line) for line in (folders[2] / "metrics.jsonl").read_text().splitlines()]
    assert last["kind"] == "result"  # written after the test set was evaluated and recorded
    logged = {key for line in lines for key in line}
    assert {"val_loss", "val_accuracy"} <= logged
    assert not any("test" in key for key in logged)
    assert not any("test" in field.name or "stop" in field.name for field in fields(TrainConfig))


def test_over_tuning_of_meta_parameters(train: Callable[..., Path], tmp_path: Path, data_dir: Path, verb: Verb) -> None:
    """Each trial by hand widens the interval. A sweep's trials evaluate on validation images only."""
    for number, scale in enumerate(("0.5", "1", "2"), start=1):
        result = result_of(train(f"lr-{scale}", "--lr-scale", scale))
        assert result["num_test_looks"] == number
        assert is_widened(result, number)
    before = (tmp_path / "runs/ledger.jsonl").read_text()
    folder = tmp_path / "runs" / "study-sweep"
    known = ["--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", "--epochs", "1"]
    done = verb("study", "sweep", "--grid", "lr_scale=0.5,1", "--run-dir", str(folder), *known)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/ledger.jsonl").read_text() == before
    written = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".csv", ".md")]
    assert written
    assert not any("test_accuracy" in path.read_text() for path in written)


def test_data_set_selection(train: Callable[..., Path], runs: Path, verb: Verb) -> None:
    """Try several data sets, report the best figure: every report names all evaluated test sets."""
    other = train("made-up", "--dataset", "synthetic")
    assert sorted(name.split()[0] for name in result_of(other)["looks_by_dataset"]) == ["mnist-mini", "synthetic"]
    assert "mnist-mini 06549f7d: 3" in page_of(other)
    done = verb("compare", *map(str, [*runs.glob("seed-*"), other]))
    assert done.returncode == 0, done.stderr
    tables = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("tested on ")]
    assert sorted(tables) == ["mnist-mini", "synthetic"]


def test_clauses_for_one_data_set(train: Callable[..., Path], runs: Path) -> None:
    """A change for one data set is another setting, and the report shows it."""
    special = train("special", "--lr-scale", "0.3", "--global-batch-size", "50")
    settings = {entry["run"]: entry["setting_sha256"] for entry in ledger_entries(runs)}
    assert settings["seed-0"] != settings["special"]
    assert "global_batch_size" in (special / "report.html").read_text()
    fingerprint = json.loads((special / "config.json").read_text())["fingerprint"]
    # A batch of half the size has a rate lower by the square root of two.
    assert fingerprint["recipe"]["rules"]["filters"]["lr"] == pytest.approx(0.03 / 2**0.5)
    assert fingerprint["recipe"]["global_batch_size"] == 50


def test_no_part_of_training_knows_a_data_set_by_name() -> None:
    """A clause needs the name. Only recipes, which the report prints in full, and sources may have it."""
    rooms = ("loop", "ranks", "evaluation", "models")
    sources = [path for room in rooms for path in (ROOT / "trainer" / room).glob("*.py")]
    assert len(sources) > 4 * len(rooms)
    for path in sources:
        text = path.read_text()
        assert '"mnist' not in text, path
        assert '"cifar10' not in text, path


def test_seed_selection(three_seeds: Path, verb: Verb) -> None:
    """Run seeds, show the best: its report shows all, and `compare` refuses until all are named."""
    folders = [three_seeds / f"seed-{seed}" for seed in range(3)]
    last = result_of(folders[2])
    assert set(last["test_accuracy_of_seeds"]) == {"0", "1", "2"}
    assert "3 evaluated networks with these settings, from 3 seeds" in page_of(folders[2])
    best = max(folders, key=lambda folder: float(result_of(folder)["test_accuracy"]))
    done = verb("compare", str(best))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "only all runs of a setting" in done.stderr
    done = verb("compare", *map(str, folders))
    assert done.returncode == 0, done.stderr
    again = verb("compare", *[str(best)] * 3, *map(str, folders))
    assert again.stdout == done.stdout  # naming the best more often changes no mean
    assert f"{min(100 * result_of(folder)['test_accuracy'] for folder in folders):.2f}" in done.stdout


def test_selection_by_the_number_of_ranks(train: Callable[..., Path], runs: Path, verb: Verb) -> None:
    """One seed trained with one rank and with two gives two networks, and both are shown."""
    alone, two = runs / "seed-0", train("two", ranks=2)
    if result_of(alone)["weights_sha256"] == result_of(two)["weights_sha256"]:
        pytest.skip("here the number of ranks does not change the rounding")
    assert len(result_of(two)["test_accuracy_of_seeds"]["0"]) == 2
    for one, other in ((alone, two), (two, alone)):
        done = verb("compare", str(one), str(runs / "seed-1"), str(runs / "seed-2"))
        assert done.returncode == 2
        assert f"also evaluated in {other.name} (seed 0):" in done.stderr


def test_changing_the_ledger(run_trainer: RunTrainer, runs: Path, verb: Verb) -> None:
    """A changed line stops the next run at its start; a removed one stops the comparison of runs that counted it."""
    ledger = runs / "ledger.jsonl"
    first, second, third = ledger.read_text().splitlines(keepends=True)
    ledger.write_text(first + second.replace('"num_errors": ', '"num_errors": 1') + third)
    done = run_trainer("--epochs", "1", "--seed", "9", "--run-dir", str(runs / "next"))
    assert done.returncode == 4
    assert "ledger.jsonl, line 2, was changed after it was written" in done.stderr
    assert "epoch 1/1" not in done.stdout
    ledger.write_text(first + third)
    done = verb("compare", str(runs / "seed-0"), str(runs / "seed-2"))
    assert done.returncode == 2
    assert f"holds 2 evaluations on this test set, but {runs / 'seed-2'} counted 3" in done.stderr
