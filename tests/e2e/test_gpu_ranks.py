"""Several ranks over NCCL train as one does, by each reduction of the gradients."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.gpu_ranks import EVERYTHING, ON_A_GPU, PLAIN, SHARED, Command, at_once, complete, losses, trained
from tests.e2e.test_training import result_of

pytestmark = [pytest.mark.gpu, *ON_A_GPU]

REDUCTIONS = {"auto": 0.01, "vector": 0.01, "ddp-bfloat16": 0.05}
"""The relative tolerance of the losses, by `--gradient-reduction`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def printed(one_gpu: None, folder: Path, gpu_command: Command) -> dict[str, str]:
    """What trainings print: of one rank (`alone`), and of two ranks for each reduction."""
    commands = {"alone": gpu_command(*PLAIN, "--run-dir", str(folder / "alone"))}
    for name in REDUCTIONS:
        options = (*PLAIN, "--gradient-reduction", name, "--run-dir", str(folder / name))
        commands[name] = gpu_command(*options, ranks=2)
    runs = [partial(trained, command, may_be_eager="bfloat16" in name) for name, command in commands.items()]
    return dict(zip(commands, at_once(*runs), strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_ranks_train_as_one_does(reduction: str, printed: dict[str, str], folder: Path) -> None:
    assert ("gradients added up by DDP" in printed[reduction]) == (reduction != "vector")
    assert losses(folder / reduction) == pytest.approx(losses(folder / "alone"), rel=REDUCTIONS[reduction])
    alone, together = (result_of(folder / name)["test_accuracy"] for name in ("alone", reduction))
    assert together == pytest.approx(alone, abs=REDUCTIONS[reduction])


def test_four_ranks_and_everything_else(tmp_path: Path, gpu_command: Command) -> None:
    """One rank in eight parts, and four ranks in two parts, have the same shards."""
    options = {1: (*EVERYTHING, "--grad-accumulation", "8"), 4: (*EVERYTHING, "--grad-accumulation", "2")}
    commands = [gpu_command(*options[n], "--run-dir", str(tmp_path / str(n)), ranks=n) for n in options]
    _, printed = at_once(*(partial(trained, command) for command in commands))
    assert "gradients added up by DDP" in printed
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=0.03)


@pytest.mark.usefixtures("printed")
def test_evaluation_on_two_ranks_gives_the_figures_of_the_training(folder: Path, data_dir: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer"]
    done = complete([*launcher, "evaluate", str(folder / "auto"), "--data-dir", str(data_dir), *SHARED])
    assert done.returncode == 0, done.stderr
    accuracy = 100 * result_of(folder / "auto")["val_accuracy"]
    assert f"validation accuracy {accuracy:.2f} %" in done.stdout


def test_more_ranks_than_gpus_are_refused_in_one_line(tmp_path: Path, gpu_command: Command) -> None:
    words = [word for word in gpu_command("--run-dir", str(tmp_path / "run"), ranks=2) if word != "--allow-shared-gpu"]
    done = complete(words)
    assert done.returncode != 0
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert "this host has 1 GPU: use at most 1" in error
    assert "--allow-shared-gpu" in error
