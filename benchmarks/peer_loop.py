"""Trains by the script of another speed run on CIFAR-10, such as airbench94_muon.py, several times in one process.

Run by `benchmarks/gpu.py --peer FILE`, as a program that takes turns. The script is loaded as it is, and compiled and
warmed up by its own `main("warmup", model)`. Known are scripts with airbench's outline: `CifarNet`, `main(run, model)`,
`evaluate(model, loader, tta_level)`, and `print_training_details`, which is shown `time_seconds`. That is the time of
preparing and training with the evaluation with several views, which is taken off again here.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from turns import serve

from trainer.data import load_dataset
from trainer.data.test_set import load_test_set
from trainer.paths import default_data_dir

OUTLINE = ("CifarNet", "main", "evaluate", "print_training_details")


def write_cifar10(folder: Path, data_dir: Path) -> None:
    """Writes CIFAR-10 from the trainer's cache in the two files that airbench and its successors read."""
    dataset = load_dataset("cifar10", data_dir, log=print)
    folder.mkdir()
    for name, images in (("train", dataset.train), ("test", load_test_set(dataset))):
        pixels = images.images.permute(0, 2, 3, 1).contiguous()
        torch.save(
            {"images": pixels, "labels": images.labels.clone(), "classes": dataset.classes}, folder / f"{name}.pt"
        )


def load_script(path: Path) -> ModuleType:
    """Returns the script as a module, without its last part, `if __name__ == "__main__"`."""
    sys.argv = [str(path)]  # the scripts keep their own text
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = module
    spec.loader.exec_module(module)
    lacking = [name for name in OUTLINE if not hasattr(module, name)]
    if lacking:
        sys.exit(f"error: {path} has no {', '.join(lacking)}: give airbench94_muon.py or a script of the same outline")
    return module


class Clock:
    """Takes a run's figures from what the script shows, and times its evaluation with several views."""

    def __init__(self, script: Any) -> None:
        self.seconds = self.evaluation = self.accuracy = 0.0
        evaluate = script.evaluate

        def timed(model: Any, loader: Any, tta_level: int = 0) -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            accuracy: float = evaluate(model, loader, tta_level)
            torch.cuda.synchronize()
            if tta_level == 2:
                self.evaluation, self.accuracy = time.perf_counter() - began, accuracy
            return accuracy

        def show(variables: dict[str, Any], is_final_entry: bool) -> None:
            if is_final_entry:
                self.seconds = float(variables["time_seconds"])

        script.evaluate, script.print_training_details = timed, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    args = parser.parse_args()
    path, began = args.script.absolute(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_cifar10(Path(folder) / "cifar10", args.data_dir)
        os.chdir(folder)  # the scripts read ./cifar10
        script: Any = load_script(path)
        clock = Clock(script)
        model = script.CifarNet().cuda().to(memory_format=torch.channels_last)
        model.compile(mode="max-autotune")
        script.main("warmup", model)

        def run(number: int) -> dict[str, float]:
            script.main(number, model)
            return {
                "train_seconds": clock.seconds - clock.evaluation,
                "with_evaluation_seconds": clock.seconds,
                "test_accuracy": clock.accuracy,
            }

        serve({"ready_seconds": time.perf_counter() - began}, run)


if __name__ == "__main__":
    main()
