"""Compares the ways to add up gradients on several GPUs: `torchrun --nproc_per_node=N benchmarks/reductions.py`.

For each recipe: microseconds of a step with our vector, with DDP, and with DDP in bfloat16, in turn in the same
processes, after their CUDA graphs are captured. Prints one JSON line; `benchmarks/gpu.py` runs it on several GPUs. With
`--allow-shared-gpu` ranks share a GPU: that shows that it works, and says nothing about speed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from trainer.config import GradientReduction, TrainConfig
from trainer.data import load_dataset, without_test_images
from trainer.loop.sources import ResidentSource
from trainer.paths import default_data_dir
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.records.run_folder import RunFolder
from trainer.train import setup

REDUCTIONS: tuple[GradientReduction, ...] = ("vector", "ddp", "ddp-bfloat16")
NUM_WARM_UP = 30
"""Steps before the clock: DDP's graph is captured after 12."""


def measure(
    config: TrainConfig, world: World, num_steps: int, num_rounds: int, log: Callable[[str], None]
) -> dict[str, float]:
    """Returns the median microseconds of a step of each way; they take turns, so that all meet the same machine."""
    recipe = config.resolve().as_computed_on(world.device)
    dataset = without_test_images(load_dataset(recipe.dataset, config.data_dir, log=log))
    steps = {}
    for reduction in REDUCTIONS:
        own = replace(world, gradient_reduction=reduction)
        with tempfile.TemporaryDirectory() as folder:
            plan = RunFolder.plan(replace(config, run_dir=Path(folder) / "run"), recipe, dataset, own)
        run = setup(recipe, dataset, plan, own, Progress(is_main=False))
        run.learner.model.train()
        steps[reduction] = (run.learner, ResidentSource(run).batch(0))
        for _ in range(NUM_WARM_UP):
            run.learner.step(steps[reduction][1])
    found: dict[str, list[float]] = {reduction: [] for reduction in REDUCTIONS}
    for _ in range(num_rounds):
        for reduction, (learner, batch) in steps.items():
            wait_for(world)
            began = time.perf_counter()
            for _ in range(num_steps):
                learner.step(batch)
            wait_for(world)
            found[reduction].append(1e6 * (time.perf_counter() - began) / num_steps)
    for learner, _ in steps.values():
        learner.release()
    return {reduction: statistics.median(values) for reduction, values in found.items()}


def wait_for(world: World) -> None:
    """Returns when all ranks have computed what they were given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["mnist", "mnist-fast", "cifar10", "cifar10-resnet18"])
    parser.add_argument("--dataset", help="instead of the recipes'; mnist-mini needs no network")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), help="folder of data sets")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--allow-shared-gpu", action="store_true")
    args = parser.parse_args()
    with World.join(args.device, allow_shared_gpu=args.allow_shared_gpu) as world:
        found = {}
        for recipe in args.recipes:
            config = TrainConfig(recipe=recipe, dataset=args.dataset, data_dir=args.data_dir)
            found[recipe] = measure(config, world, args.steps, args.rounds, lambda line: print(line, file=sys.stderr))
        if world.is_main:
            print(json.dumps({"ranks": world.size, "device": world.device.type, "microseconds_a_step": found}))


if __name__ == "__main__":
    main()
