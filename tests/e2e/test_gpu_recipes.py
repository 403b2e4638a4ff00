"""Whole trainings on a GPU reach the accuracy of their recipes, on real data sets: `pytest -m gpu --data-dir=DIR`."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.gpu_ranks import ON_A_GPU, at_once, complete
from tests.e2e.test_training import result_of
from trainer.data import load_dataset
from trainer.errors import DataError
from trainer.recipes import RECIPES

pytestmark = [pytest.mark.gpu, *ON_A_GPU]

LEAST = {"mnist": 0.988, "mnist-fast": 0.993, "cifar10": 0.935, "cifar10-fast": 0.93}
"""Accuracies with the recipes' views, several standard deviations below the means of their seeds."""

Runs = dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def runs(one_gpu: None, folder: Path, request: pytest.FixtureRequest) -> Runs:
    """Trainings of the chosen tests' recipes, at the same time; without those whose data sets are not there."""
    data_dir: Path | None = request.config.option.data_dir
    if data_dir is None:
        pytest.skip("give --data-dir=DIR, a folder with MNIST and CIFAR-10 as `convoy data fetch` leaves them")
    commands = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path:
            recipe = item.callspec.params["recipe"]
            try:
                load_dataset(RECIPES[recipe].dataset, data_dir.absolute(), log=lambda line: None)
            except DataError:
                continue
            options = ["--recipe", recipe, "--data-dir", str(data_dir.absolute()), "--no-export", "--device", "cuda"]
            options += ["--num-validation", "0"] if recipe == "cifar10-fast" else []
            options += ["--run-dir", str(folder / recipe)]
            commands[recipe] = [sys.executable, str(ROOT / "trainer/main.py"), *options]
    if not commands:
        return {}
    return dict(zip(commands, at_once(*(partial(complete, command) for command in commands.values())), strict=True))


@pytest.mark.parametrize("recipe", LEAST)
def test_a_recipe_reaches_its_accuracy(recipe: str, runs: Runs, folder: Path) -> None:
    if recipe not in runs:
        pytest.skip(f"--data-dir lacks {RECIPES[recipe].dataset}")
    done = runs[recipe]
    assert done.returncode == 0, done.stderr
    assert "no CUDA graph" not in done.stdout
    result = result_of(folder / recipe)
    assert result.get("test_accuracy_with_views", result["test_accuracy"]) >= LEAST[recipe]
