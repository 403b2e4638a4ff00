"""Measures what the safety of a run costs its steps: the copy for a checkpoint, and the comparison of weights.

Run by `benchmarks/training.py` under torchrun with two ranks; prints one JSON line, in milliseconds.
"""

import json
import statistics
import time

import torch

from convoy.allocator import keep_freed_memory
from trainer.data import load_dataset
from trainer.loop.learner import build_learner
from trainer.paths import default_data_dir
from trainer.ranks.consistency import digest_of
from trainer.ranks.world import World
from trainer.recipes import RECIPES
from trainer.records.checkpoint import copy_to_cpu

NUM_TIMES = 50


def main() -> None:
    keep_freed_memory()
    with World.join("cpu") as world:
        dataset = load_dataset("mnist", default_data_dir(), log=lambda line: None)
        learner = build_learner(RECIPES["mnist"], dataset, torch.arange(len(dataset.train)), 0, world, print)
        stalls, comparisons = [], []
        for _ in range(NUM_TIMES):
            began = time.perf_counter()
            copy_to_cpu(learner.state_dict())
            stalls.append(1000 * (time.perf_counter() - began))
            world.barrier()
            began = time.perf_counter()
            world.all_gather(digest_of(list(learner.model.state_dict().values())).cpu())
            comparisons.append(1000 * (time.perf_counter() - began))
        if world.is_main:
            print(json.dumps({"stall_ms": statistics.median(stalls), "compare_ms": statistics.median(comparisons)}))


if __name__ == "__main__":
    main()
