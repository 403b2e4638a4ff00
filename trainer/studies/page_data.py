"""The numbers of the page's section Lecture, those of the studies' default options and of committed results.

`python -m trainer.studies.page_data` writes them anew: the page draws the points that the commands beside them use.
"""

import csv
import json
from pathlib import Path
from typing import Any

import torch

import convoy.web
from trainer.files import write_atomically
from trainer.studies.capacity import CapacityConfig, first_points, true_function
from trainer.studies.regression import RegressionConfig, make_people
from trainer.studies.seeds_page import LECTURE

PATH = Path(convoy.web.__file__).with_name("static") / "lecture_data.js"
SEEDS = "seeds-mnist-2026-11-27.csv"
NETWORKS = {
    "widths": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "train": [73.2, 53.73, 17.73, 6.4, 1.333, 0, 0, 0, 0],
    "test": [78.7, 66.02, 41.47, 29.77, 27.52, 23.73, 22.77, 22.87, 22.42],
}
"""Errors in %, of benchmarks/results/studies-2026-11-23.md."""


def make_data(results: Path) -> dict[str, Any]:
    """Returns the numbers.

    Args:
        results: the folder `benchmarks/results`.
    """
    people, capacity = RegressionConfig(), CapacityConfig()
    ages, pressures = make_people(people.num_people, people.noise, people.seed)
    x, y = first_points(capacity.num_points, capacity.noise, capacity.seed)
    with (results / SEEDS).open() as file:
        errors = [float(row["test error, %"]) for row in csv.DictReader(file)]
    return {
        "people": {"ages": _rounded(ages, 3), "pressures": _rounded(pressures, 3)},
        "points": {"x": _rounded(x, 5), "z": _rounded((y - true_function(x)) / capacity.noise, 5)},
        "seeds": errors,
        "lectureSeeds": LECTURE,
        "networks": NETWORKS,
    }


def to_module(data: dict[str, Any]) -> str:
    """Returns the numbers as a module of JavaScript."""
    lines = (f"  {name}: {json.dumps(value)}," for name, value in data.items())
    return "\n".join(
        ["// Written by `python -m trainer.studies.page_data`.", "export const data = {", *lines, "};", ""]
    )


def _rounded(values: torch.Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


if __name__ == "__main__":
    write_atomically(PATH, to_module(make_data(Path("benchmarks/results"))).encode())
