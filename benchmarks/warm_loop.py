"""Trains a recipe of ours several times in one process: the graphs are captured once, before the clock starts.

Run by `benchmarks/gpu.py`, as a program that takes turns. The clock runs from the initial weights and the whitening to
the last step; the evaluation on the test images, with the recipe's views, is not timed.
"""

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from turns import serve

from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset, without_test_images
from trainer.data.test_set import load_test_set
from trainer.loop.learner import initial_model
from trainer.loop.run import Run
from trainer.loop.sources import ResidentSource
from trainer.paths import default_data_dir
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.records.run_folder import RunFolder
from trainer.train import setup

NUM_WARM_UP = 8
"""Steps of each kind before the clock: the graph is captured in the fourth."""


def open_run(config: TrainConfig, world: World, dataset: Dataset | None = None) -> tuple[Run, Dataset]:
    """Returns a run of a command line that writes nothing, and its data set with the test images."""
    recipe = config.resolve().as_computed_on(world.device)
    dataset = dataset or load_dataset(recipe.dataset, config.data_dir, log=print)
    training = without_test_images(dataset)
    with tempfile.TemporaryDirectory() as folder:
        plan = RunFolder.plan(replace(config, run_dir=Path(folder) / "run"), recipe, training, world)
    return setup(recipe, training, plan, world, Progress(is_main=False)), dataset


class WarmTraining:
    """A learner that trains again and again from other seeds."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._run, dataset = open_run(config, world)
        self._test = load_test_set(dataset)
        self._clean = copy.deepcopy(self._run.learner.state_dict())
        self._run.learner.model.train()
        source = ResidentSource(self._run)
        self._images, batch = source.images, source.batch(0)
        for kind in self._run.kinds:
            for _ in range(NUM_WARM_UP):
                self._run.learner.step(replace(batch, kind=kind))

    def train(self, seed: int) -> dict[str, float]:
        """Trains from a seed, and returns seconds and the test accuracy with the recipe's views."""
        run = replace(self._run, seed=seed)
        device = run.world.device
        wait_for(device)
        began = time.perf_counter()
        self._prepare(run)
        wait_for(device)
        prepared = time.perf_counter()
        source = ResidentSource(run, images=self._images)
        run.learner.model.train()
        for step in range(run.num_steps):
            run.learner.step(source.batch(step))
        wait_for(device)
        ended = time.perf_counter()
        found = run.learner.evaluate(self._test, None, run.world)
        accuracy = found.accuracy if found.accuracy_with_views is None else found.accuracy_with_views
        return {
            "train_seconds": ended - began,
            "preparing_seconds": prepared - began,
            "with_evaluation_seconds": time.perf_counter() - began,
            "test_accuracy": accuracy,
        }

    def _prepare(self, run: Run) -> None:
        """Gives the learner the initial weights of the run's seed, and a clean optimizer."""
        device = run.world.device
        model = initial_model(run.recipe, run.dataset, run.train_indices, run.seed, device=device)
        weights = model.state_dict()
        state: dict[str, Any] = {**self._clean, "model": weights}
        if run.learner.average is not None:
            state["average"] = {**state["average"], "weights": weights}
        run.learner.load_state_dict(state)


def wait_for(device: torch.device) -> None:
    """Returns when the device has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", nargs="*", default=[], help="fields of the recipe, as for a training")
    parser.add_argument("--dataset", help="instead of the recipe's")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    began = time.perf_counter()
    config = TrainConfig(
        recipe=args.recipe, dataset=args.dataset, set=tuple(args.set), num_validation=0, data_dir=args.data_dir
    )
    with World.join(args.device) as world:
        training = WarmTraining(config, world)
        wait_for(world.device)
        serve({"ready_seconds": time.perf_counter() - began}, training.train)


if __name__ == "__main__":
    main()
