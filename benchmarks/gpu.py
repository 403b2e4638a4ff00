"""Measures training on a GPU in at most 8 minutes: `python benchmarks/gpu.py`. Needs the trainer's requirements only.

- steps: microseconds of a step as one CUDA graph, with our kernels, with torch's, and compiled; kernels by kind;
- clock: whole trainings on CIFAR-10 in a warm process, from the initial weights to the last step;
- cold: whole commands, from their start to their end;
- seeds: steps of many seeds as branches of one graph, and a study of 100 seeds;
- ranks: our vector and DDP, on the GPUs that there are, or two ranks that share one.

`--peer FILE ...` (airbench94_muon.py, hiverge's cifar10_speedrun.py) measures the clock alone, ours and theirs in turn,
20 runs each. Writes `gpu-DATE.json` and a table in Markdown after each part; with `--part`, their names have the parts.
What fails, or is cut off by SIGTERM, is named at the end of the table, and the rest is measured and written all the
same.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_tables import table
from parts import Parts, results_folder
from training import ROOT, run_json, write_results
from turns import Child
from warm_loop import open_run, wait_for

from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.hardware import describe
from trainer.kernels.choice import torch_only
from trainer.loop.sources import ResidentSource
from trainer.paths import default_data_dir
from trainer.ranks.world import World
from trainer.studies.branches import Branches

WAYS = ("our kernels", "torch's kernels", "compiled")
STEPS = ("mnist", "mnist-fast", "cifar10", "cifar10-fast", "cifar10-resnet18", "cifar10-96")
COMPILED = ("mnist", "cifar10", "cifar10-resnet18")
CLOCKED = ("cifar10-fast", "cifar10")
COLD = ("mnist", "cifar10-fast", "cifar10")
NUM_TOGETHER = {"mnist": (1, 4, 16, 32, 64), "mnist-fast": (1, 16, 64)}
REDUCED = ("mnist", "mnist-fast", "cifar10", "cifar10-resnet18")
NUM_WARM_UP = 20
BLOCK = 5
"""Trainings of a program before the next one has its turn."""
KERNELS_SHOWN = 12
LINES = {
    "set up": r"\S+ on \S+: ",
    "first epoch": r"epoch 1/",
    "last epoch": r"epoch (\d+)/\1:",
    "report": r"report: ",
}
"""Lines of a training, of which the time is told."""


class Bench(Parts):
    """The command line, the time that is left, and the data sets."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(60 * args.minutes)
        self.args = args
        self._datasets: dict[str, Dataset] = {}

    def config(self, recipe: str, **changes: Any) -> TrainConfig:
        return TrainConfig(recipe=recipe, dataset=self.args.dataset, data_dir=self.args.data_dir, **changes)

    def dataset(self, config: TrainConfig) -> Dataset:
        name = config.resolve().dataset
        if name not in self._datasets:
            self._datasets[name] = load_dataset(name, self.args.data_dir, log=print)
        return self._datasets[name]

    def options(self) -> list[str]:
        dataset = ["--dataset", self.args.dataset] if self.args.dataset else []
        return [*dataset, "--data-dir", str(self.args.data_dir), "--device", self.args.device]


def measure_steps(bench: Bench, found: dict[str, Any]) -> None:
    """Finds microseconds per step of each recipe and way, and the kernels of our way."""
    with World.join(bench.args.device) as world:
        for recipe in STEPS:
            for way in WAYS[: bench.args.ways]:
                if bench.is_over or (way == "compiled" and recipe not in COMPILED):
                    continue
                with bench.part(f"step of {recipe}, {way}"):
                    timed = _time_step(bench, recipe, way, world)
                    found.setdefault(recipe, {})[way] = timed
                    print(f"step of {recipe}, {way}: {timed}", flush=True)


def _time_step(bench: Bench, recipe: str, way: str, world: World) -> dict[str, Any]:
    config = bench.config(recipe, compile=way == "compiled")
    began = time.perf_counter()
    with torch_only() if way == "torch's kernels" else nullcontext():
        run, _ = open_run(config, world, bench.dataset(config))
        run.learner.model.train()
        batch = ResidentSource(run).batch(0)
        found: dict[str, Any] = {"microseconds": {}, "images": run.recipe.global_batch_size}
        for kind in run.kinds:
            batch = replace(batch, kind=kind)
            for _ in range(NUM_WARM_UP):
                run.learner.step(batch)
            wait_for(world.device)
            found.setdefault("ready_seconds", time.perf_counter() - began)
            shown = str(kind.image_size or run.dataset.train.shape[1])
            shown += "" if kind.trains_whitening_bias else ", frozen bias"
            found["microseconds"][shown] = 1e6 * _seconds_of(partial(run.learner.step, batch), world.device)
        if way == "our kernels" and world.device.type == "cuda":
            found["kernels"] = _kernels(partial(run.learner.step, batch), world.device)
        run.learner.release()
    return found


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Returns the mean seconds of a call, over about 0.6 seconds."""
    began = time.perf_counter()
    work()
    wait_for(device)
    number = max(3, min(2000, int(0.6 / max(time.perf_counter() - began, 1e-5))))
    began = time.perf_counter()
    for _ in range(number):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / number


def _kernels(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Returns the number of kernels of a call, and the microseconds of the kinds that take most."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(5):
                work()
            wait_for(device)
        found = [row for row in profiler.key_averages() if row.self_device_time_total > 0]
        rows = [(row.key, row.self_device_time_total / 5, row.count / 5) for row in found]
    except (AttributeError, RuntimeError) as error:  # no profiler on this machine
        return {"error": str(error)}
    rows.sort(key=lambda row: -row[1])
    return {"number": sum(row[2] for row in rows), "most": {name[:80]: us for name, us, _ in rows[:KERNELS_SHOWN]}}


def measure_clock(bench: Bench, found: dict[str, Any]) -> None:
    """Finds warm trainings on all images of CIFAR-10, ours and the peers' in turn."""
    script, own = ROOT / "benchmarks" / "peer_loop.py", ROOT / "benchmarks" / "warm_loop.py"
    programs = {path.name: [str(script), str(path), "--data-dir", str(bench.args.data_dir)] for path in bench.args.peer}
    programs |= {recipe: [str(own), "--recipe", recipe, *bench.options()] for recipe in CLOCKED}
    children = {}
    for name, command in programs.items():  # one after another: each chooses its kernels by their times
        with bench.part(f"clock of {name}"):
            child = children[name] = Child([sys.executable, *command])
            found[name] = {**child.prepared, "runs": child.results}
            print(f"{name} is ready after {child.prepared['ready_seconds']:.0f} s", flush=True)
    waiting = dict(children)
    while waiting and not bench.is_over:
        for name, child in list(waiting.items()):
            number = min(BLOCK, bench.args.runs - len(child.results))
            with bench.part(f"clock of {name}"):
                child.run(number)
                print(f"{name}: {child.results[-1]}", flush=True)
            if f"clock of {name}" in bench.left_out or len(child.results) >= bench.args.runs:
                del waiting[name]
    for name, child in children.items():
        with bench.part(f"end of {name}"):
            child.close()


def measure_cold(bench: Bench, found: dict[str, Any]) -> None:
    """Finds whole commands, with everything from the start of Python to the report: kernels are compiled anew."""
    for _ in range(bench.args.rounds):
        for recipe in COLD:
            if not bench.is_over:
                with bench.part(f"command of {recipe}"):
                    figures = _time_command(bench, recipe)
                    found.setdefault(recipe, []).append(figures)
                    print(f"command of {recipe}: {figures}", flush=True)


def _time_command(bench: Bench, recipe: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = ["--num-validation", "0", "--no-export", "--run-dir", str(run)]
        command = [sys.executable, "-m", "convoy", "train", recipe, *options, *bench.options()]
        seconds, until = _time_lines(command, TRITON_CACHE_DIR=f"{folder}/cache", PYTHONUNBUFFERED="1")
        result = _read_result(run)
    accuracy = result.get("test_accuracy_with_views", result["test_accuracy"])
    figures = {"seconds": seconds, "train_seconds": result["train_seconds"], "test_accuracy": accuracy}
    return {**figures, "seconds_until": until}


def measure_seeds(bench: Bench, found: dict[str, Any]) -> None:
    """Finds the rates of seeds as branches of one graph, and the seconds of a study of 100 seeds."""
    found["side by side"] = {}
    with World.join(bench.args.device) as world:
        for recipe, numbers in NUM_TOGETHER.items():
            for number in numbers:
                if not bench.is_over:
                    with bench.part(f"{number} seeds of {recipe}"):
                        rates = _time_seeds(bench, recipe, number, world)
                        found["side by side"].setdefault(recipe, {})[str(number)] = rates
                        print(f"{number} seeds of {recipe}: {rates}", flush=True)
                    if world.device.type == "cuda":
                        torch.cuda.empty_cache()
    if not bench.is_over and world.device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            study = Path(folder) / "runs" / "study"
            _run([sys.executable, "-m", "convoy", "study", "seeds", "--run-dir", str(study), *bench.options()])
            found["study of 100 seeds of mnist"] = {"seconds": time.perf_counter() - began, **_shares(study)}
            print(f"study of 100 seeds: {found['study of 100 seeds of mnist']}", flush=True)


def _time_seeds(bench: Bench, recipe: str, number: int, world: World) -> dict[str, float]:
    config = bench.config(recipe, epochs=2)
    runs = [open_run(replace(config, seed=seed), world, bench.dataset(config))[0] for seed in range(number)]
    branches = Branches(runs, print)
    branches.train_epoch(0)
    began = time.perf_counter()
    branches.train_epoch(1)
    wait_for(world.device)
    seconds = time.perf_counter() - began
    branches.release()
    return {
        "microseconds_a_step_of_all": 1e6 * seconds / runs[0].steps_per_epoch,
        "images_per_second": number * len(runs[0].train_indices) / seconds,
    }


def _shares(study: Path) -> dict[str, float]:
    results = [_read_result(path) for path in study.glob("seed-*")]
    return {
        "training_seconds": sum(result["train_seconds"] for result in results),
        "mean_error_percent": 100 * (1 - statistics.mean(result["test_accuracy"] for result in results)),
    }


def measure_ranks(bench: Bench, found: dict[str, Any]) -> None:
    """Finds the ways to add up gradients, on all GPUs, or on two ranks that share the only one."""
    ranks, is_shared = max(2, torch.cuda.device_count()), torch.cuda.device_count() < 2
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    shared = ["--allow-shared-gpu", "--steps", "30", "--rounds", "3"] if is_shared else []
    for recipe in ("mnist", "cifar10-resnet18") if is_shared else REDUCED:
        if not bench.is_over:
            with bench.part(f"ranks, {recipe}"):
                options = ["--recipes", recipe, *bench.options(), *shared]
                figures = run_json([*launcher, "benchmarks/reductions.py", *options])
                found |= {"ranks": figures["ranks"], "one_gpu_is_shared": is_shared}
                found.setdefault("microseconds_a_step", {}).update(figures["microseconds_a_step"])
                print(f"{ranks} ranks, {recipe}: {figures['microseconds_a_step'][recipe]}", flush=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _time_lines(command: list[str], **variables: str) -> tuple[float, dict[str, float]]:
    """Runs a training; returns its seconds, and those until it prints certain lines."""
    began, until, lines = time.perf_counter(), dict[str, float](), []
    environment = {**os.environ, **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for line in process.stdout or ():
            lines.append(line)
            for name, pattern in LINES.items():
                if re.match(pattern, line):
                    until[name] = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{''.join(lines)}")
    return time.perf_counter() - began, until


def _read_result(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


PARTS: dict[str, Callable[[Bench, dict[str, Any]], None]] = {
    "steps": measure_steps,
    "clock": measure_clock,
    "cold": measure_cold,
    "seeds": measure_seeds,
    "ranks": measure_ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), help="parts to measure [default: all, or the clock]")
    parser.add_argument("--peer", type=Path, nargs="+", default=[], help="scripts of other speed runs on CIFAR-10")
    parser.add_argument("--ways", type=int, default=len(WAYS), help=f"of steps, the first ones of {', '.join(WAYS)}")
    parser.add_argument("--runs", type=int, default=20, help="warm trainings of each")
    parser.add_argument("--rounds", type=int, default=3, help="cold commands of each")
    parser.add_argument("--minutes", type=float, default=8, help="after them, nothing new begins")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), help="folder of data sets")
    parser.add_argument("--dataset", help="instead of the recipes', such as synthetic, to try this program")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    parser.add_argument("--out", type=Path, help="of the two files [default: benchmarks/results, on cpu a new folder]")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; this measures training on one")
    args.out = results_folder(args.out, args.device)
    args.peer, args.data_dir = [path.absolute() for path in args.peer], args.data_dir.absolute()
    bench = Bench(args)
    machine = describe(torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu"))
    measured: dict[str, Any] = {}
    for part in args.part or (["clock"] if args.peer else list(PARTS)):
        with bench.part(part):
            PARTS[part](bench, measured.setdefault(part, {}))
        lines = [
            f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}` on {machine['device']}, torch {machine['torch']}. "
            "Medians, in brackets the smallest and the largest; programs of a table take turns.",
            "",
            *table(measured, bench.left_out),
        ]
        name = "-".join(["gpu", *(args.part or [])])
        content = {**measured, "failures": bench.left_out}
        write_results(name, "Training on a GPU", machine, content, lines, args.out)
    if bench.left_out:
        sys.exit(f"error: not measured: {', '.join(bench.left_out)}")


if __name__ == "__main__":
    main()
