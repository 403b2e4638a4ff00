"""Trains several times in one process, as a study does: the first training is cold, the others are warm.

Run by `benchmarks/gpu.py`; the last line is JSON, one object per training.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from trainer.config import TrainConfig
from trainer.train import train


def train_once(recipe: str, seed: int, folder: Path) -> dict[str, float]:
    """Trains once; returns the seconds of the steps and of the whole run, and the test accuracy."""
    began = time.perf_counter()
    train(TrainConfig(recipe=recipe, seed=seed, run_dir=folder / f"s{seed}", export=False))
    seconds = time.perf_counter() - began
    result = json.loads((folder / f"s{seed}" / "result.json").read_text())
    return {
        "train_seconds": result["train_seconds"],
        "seconds": seconds,
        # With the recipe's views, as airbench evaluates.
        "test_accuracy": result.get("test_accuracy_with_views", result["test_accuracy"]),
        "steps": result["steps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([train_once(args.recipe, seed, Path(folder)) for seed in args.seeds]))


if __name__ == "__main__":
    main()
