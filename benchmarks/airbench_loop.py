"""Trains with Keller Jordan's package airbench, several times in one process: `pip install airbench`.

Run by `benchmarks/gpu.py`; the last line is JSON, one object per training. Needs a GPU. airbench trains on all 50,000
images; its own clock, and the one here, starts after the data is loaded, with the whitening of the first layer.
"""

import argparse
import importlib
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from trainer.data import load_dataset
from trainer.data.test_set import load_test_set
from trainer.paths import default_data_dir


def write_cifar10(folder: Path) -> None:
    """Writes CIFAR-10 from the trainer's cache in the two files that airbench reads."""
    dataset = load_dataset("cifar10", default_data_dir(), log=print)
    folder.mkdir()
    for name, images in (("train", dataset.train), ("test", load_test_set(dataset))):
        pixels = images.images.permute(0, 2, 3, 1).contiguous()
        torch.save(
            {"images": pixels, "labels": images.labels.clone(), "classes": dataset.classes}, folder / f"{name}.pt"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=("train94", "train96"), required=True)
    parser.add_argument("--runs", type=int, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_cifar10(Path(folder) / "cifar10")
        os.chdir(folder)  # airbench reads ./cifar10
        began = time.perf_counter()
        airbench = importlib.import_module("airbench")
        library = importlib.import_module(f"airbench.lib_airbench{args.recipe.removeprefix('train')}")
        settings = library.hyp
        batch_size, augment = settings["opt"]["batch_size"], settings["aug"]
        images = library.CifarLoader("cifar10", train=True, batch_size=batch_size, aug=augment, altflip=True)
        test_images = library.CifarLoader("cifar10", train=False, batch_size=2000)
        prepared = time.perf_counter() - began
        seen = []
        for run in range(args.runs):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model = getattr(library, args.recipe)(images, verbose=False)
            torch.cuda.synchronize()
            trained = time.perf_counter() - began
            accuracy = airbench.evaluate(model, test_images, tta_level=settings["net"]["tta_level"])
            seconds = time.perf_counter() - began + (prepared if run == 0 else 0)
            seen.append({"train_seconds": trained, "seconds": seconds, "test_accuracy": accuracy})
        print(json.dumps(seen))


if __name__ == "__main__":
    main()
