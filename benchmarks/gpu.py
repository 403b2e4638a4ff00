"""Measures training on a GPU, and airbench on the same GPU in the same run: `python benchmarks/gpu.py`.

Three questions: how long the 10 epochs of `mnist` take after a warm-up; how long a step takes as one CUDA graph and
kernel by kernel; how long `cifar10` takes to its accuracy, cold and warm. Series of ours and of airbench (`pip install
airbench`) alternate, each in a process of its own, because each configures cuDNN; the first training of a process is
cold. Writes `benchmarks/results/gpu-DATE.json` and a table in Markdown.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from training import ROOT, run_json, write_results

from trainer.config import TrainConfig
from trainer.data import load_dataset, without_test_images
from trainer.hardware import describe
from trainer.loop.sources import ResidentSource
from trainer.loop.step import GraphedStep
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.records.run_folder import RunFolder
from trainer.train import setup

NUM_STEPS = 500


def run_series(script: str, *arguments: str) -> list[dict[str, float]]:
    """Runs one process of trainings; its first training gets the seconds of the whole command without the others."""
    began = time.perf_counter()
    results: list[dict[str, float]] = run_json([sys.executable, str(ROOT / "benchmarks" / script), *arguments])
    others = sum(result["seconds"] for result in results[1:])
    results[0]["command_seconds"] = time.perf_counter() - began - others
    return results


def microseconds_per_step(config: TrainConfig) -> dict[str, float]:
    """Measures the recipe's step as one CUDA graph and kernel by kernel, without the loop around it."""
    with World.join(config.device) as world, tempfile.TemporaryDirectory() as folder:
        recipe = config.resolve().as_computed_on(world.device)
        dataset = without_test_images(load_dataset(recipe.dataset, config.data_dir, log=print))
        plan = RunFolder.plan(TrainConfig(run_dir=Path(folder) / "run"), recipe, dataset, world)
        run = setup(recipe, dataset, plan, world, Progress(is_main=False))
        run.learner.model.train()
        batch = ResidentSource(run).batch(0)
        step = run.learner.step
        ways = {"kernel by kernel": step._step, "one graph": step} if isinstance(step, GraphedStep) else {"eager": step}
        found = {}
        for name, way in ways.items():
            for _ in range(20):
                way(batch)
            _wait_for(world.device)
            began = time.perf_counter()
            for _ in range(NUM_STEPS):
                way(batch)
            _wait_for(world.device)
            found[name] = 1e6 * (time.perf_counter() - began) / NUM_STEPS
        return found


def compare_reductions() -> dict[str, dict[str, float]]:
    """Measures the ways to add up gradients over all GPUs of this host; returns nothing on one GPU."""
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        return {}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"]
    found: dict[str, dict[str, float]] = run_json([*launcher, str(ROOT / "benchmarks" / "reductions.py")])[
        "microseconds_a_step"
    ]
    return found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(num_seeds: int, block: int, against: list[str]) -> dict[str, Any]:
    """Measures everything, alternating."""
    steps = {name: microseconds_per_step(TrainConfig(recipe=name)) for name in ("mnist", "mnist-fast", "cifar10")}
    print(f"microseconds per step: {steps}", flush=True)
    series: dict[str, list[list[dict[str, float]]]] = {}
    for first in range(0, num_seeds, block):
        seeds = [str(seed) for seed in range(first, min(first + block, num_seeds))]
        for recipe in ("mnist", "mnist-fast", "cifar10"):
            series.setdefault(recipe, []).append(run_series("series.py", "--recipe", recipe, "--seeds", *seeds))
        for other in against:
            arguments = ("--recipe", other, "--runs", str(len(seeds)))
            series.setdefault(f"airbench {other}", []).append(run_series("airbench_loop.py", *arguments))
        for name, blocks in series.items():
            print(f"{name}: {blocks[-1]}", flush=True)
    return {"microseconds_a_step": steps, "series": series, "reductions": compare_reductions()}


def table(measured: dict[str, Any]) -> list[str]:
    """Returns the rows of the table in Markdown."""

    def spread(values: list[float], unit: str, digits: int = 2) -> str:
        if not values:  # a process of one training has no warm one
            return "–"
        return f"{statistics.median(values):.{digits}f} {unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    lines = ["| step of | kernel by kernel | one CUDA graph |", "|---|---|---|"]
    for recipe, ways in measured["microseconds_a_step"].items():
        lines.append(f"| `{recipe}` | {' | '.join(f'{us:.0f} µs' for us in ways.values())} |")
    if measured["reductions"]:
        ways = next(iter(measured["reductions"].values()))
        lines += ["", f"| step on all GPUs, of | {' | '.join(ways)} |", f"|---|{'---|' * len(ways)}"]
        for recipe, found in measured["reductions"].items():
            lines.append(f"| `{recipe}` | {' | '.join(f'{us:.0f} µs' for us in found.values())} |")
    lines += [
        "",
        "| trainings | runs | test accuracy, mean (and its standard error) | training, warm | with evaluation and all, "
        "warm | whole command, cold |",
        "|---|---|---|---|---|---|",
    ]
    for name, blocks in measured["series"].items():
        runs = [run for block in blocks for run in block]
        warm = [run for block in blocks for run in block[1:]]
        accuracies = [100 * run["test_accuracy"] for run in runs]
        error = f" ± {statistics.stdev(accuracies) / len(accuracies) ** 0.5:.2f}" if len(accuracies) > 1 else ""
        cells = (
            name,
            str(len(runs)),
            f"{statistics.mean(accuracies):.2f}{error} %",
            spread([run["train_seconds"] for run in warm], "s", 3),
            spread([run["seconds"] for run in warm], "s"),
            spread([block[0]["command_seconds"] for block in blocks], "s"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="trainings of each kind")
    parser.add_argument("--block", type=int, default=5, help="trainings per process")
    parser.add_argument("--against", nargs="*", default=["train94", "train96"], choices=("train94", "train96"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; this measures training on one")
    measured = measure(args.seeds, args.block, args.against)
    machine = describe(torch.device("cuda", 0))
    lines = [
        f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}` on {machine['device']}, torch {machine['torch']}. "
        "Medians, in brackets the smallest and the largest; a process runs up to "
        f"{args.block} trainings, and its first is cold. "
        "airbench trains on 50,000 images, ours on 45,000, and its clock leaves out loading the data.",
        "",
        *table(measured),
    ]
    write_results("gpu", "Training on a GPU", machine, measured, lines)


if __name__ == "__main__":
    main()
