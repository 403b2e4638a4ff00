"""Runs of a small recipe, for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.loop.fit import fit
from trainer.loop.run import Run
from trainer.loop.saving import SaveInterval
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Recipe
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.train import setup

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=2)
SHORT = replace(RECIPES["mnist"], dataset="mnist-mini", epochs=2, precision="float32")


def make_run(recipe: Recipe, dataset: Dataset, folder: Path, *, world: World = ALONE, seed: int = 0) -> Run:
    """A run in its folder, before its first step."""
    config = TrainConfig(run_dir=folder, seed=seed)
    run_folder = RunFolder.plan(config, recipe, dataset, world)
    run_folder.enter(config.resume, world)
    return setup(recipe, dataset, run_folder, world, Progress(is_main=False))


def losses(run: Run, num_steps: int, save_every: SaveInterval | None = None) -> list[float]:
    """Trains that many steps and returns the mean loss of each. The last one is not counted by the run."""
    seen: list[float] = []
    step = run.learner.step

    def watched(batch: Any) -> torch.Tensor:
        result = step(batch)
        seen.append(result[0].item() / len(batch.indices))
        if len(seen) == num_steps:
            raise StopIteration
        return result

    run.learner = replace(run.learner, step=watched)
    with StopRequest() as stop, pytest.raises(StopIteration):
        fit(run, stop, save_every or SaveInterval())
    return seen
