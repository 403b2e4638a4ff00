"""Whole trainings on a GPU reach the accuracy of their recipes, on real data sets: `pytest -m gpu --data-dir=DIR`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, clean_environment
from tests.e2e.test_training import result_of
from trainer.data import load_dataset
from trainer.errors import DataError
from trainer.recipes import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("mnist", 0.988), ("mnist-fast", 0.993), ("cifar10", 0.935), ("cifar10-fast", 0.93)],
)
def test_a_recipe_reaches_its_accuracy(
    recipe: str, least: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With the recipe's views; several standard deviations below the mean of its seeds."""
    data_dir: Path | None = request.config.option.data_dir
    if data_dir is None:
        pytest.skip("give --data-dir=DIR, a folder with MNIST and CIFAR-10 as `convoy data fetch` leaves them")
    try:
        load_dataset(RECIPES[recipe].dataset, data_dir.absolute(), log=print)
    except DataError as error:
        pytest.skip(f"--data-dir {data_dir} lacks {RECIPES[recipe].dataset}: {error}")
    options = ["--recipe", recipe, "--data-dir", str(data_dir.absolute()), "--no-export", "--device", "cuda"]
    options += ["--num-validation", "0"] if recipe == "cifar10-fast" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / "trainer/main.py"), *options, "--run-dir", str(tmp_path / "run")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no CUDA graph" not in done.stdout
    result = result_of(tmp_path / "run")
    assert result.get("test_accuracy_with_views", result["test_accuracy"]) >= least
