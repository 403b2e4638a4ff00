"""The study of seeds: its figure, tables and findings."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.figures import LIGHT
from trainer.ledger import Ledger
from trainer.recipes import Recipe
from trainer.studies.page import Page, Picture, Table
from trainer.studies.summary import Summary, runs_to_tell_apart, summarize

LECTURE = {"worst": 1.3, "median": 1.0, "best": 0.82}
"""Test errors in percent of 100 runs (page 53), for the recipe `mnist` on MNIST."""
_DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Percentage points between two recipes, for the table of runs needed."""


def make_page(recipe: Recipe, results: list[dict[str, Any]], rates: dict[int, float], ledger_path: Path) -> Page:
    """Everything that the study says, from all seeds' results, none left out.

    Args:
        rates: images a second by size of stack, 0 where not measured.
    """
    errors = [100 * result["test_errors"] / result["num_test"] for result in results]
    summary = summarize(errors)
    is_lectures = recipe.name == "mnist" and recipe.dataset == "mnist"
    return Page(
        title=f"{recipe.name} on {recipe.dataset}, from {len(results)} seeds",
        findings=_findings(summary, results, is_lectures) + _about_stacking(rates) + _about_looks(results, ledger_path),
        pictures=[
            Picture(
                name="histogram",
                title="Test error by seed",
                text="How many seeds ended at which test error"
                + (", with the lecture's worst, median and best of 100 runs as dashed lines." if is_lectures else "."),
                figure=_draw_histogram(errors, summary, results[0]["num_test"], is_lectures),
            )
        ],
        tables=_tables(summary, results, errors, is_lectures),
        result={
            "recipe": recipe.name,
            "dataset": recipe.dataset,
            "runs": len(results),
            "test_errors_percent": errors,
            "worst": summary.worst,
            "median": summary.median,
            "best": summary.best,
            "mean": summary.mean,
            "deviation": summary.deviation,
            "mean_interval": summary.mean_interval,
            "median_interval": summary.median_interval,
            "images_per_second_by_stack": rates,
        },
    )


def _findings(summary: Summary, results: list[dict[str, Any]], is_lectures: bool) -> list[str]:
    sentence = (
        f"Test error: worst {summary.worst:.2f} %, median {summary.median:.2f} %, best {summary.best:.2f} %; mean "
        f"{summary.mean:.3f} %"
    )
    if summary.deviation is not None:
        sentence += f", deviation {summary.deviation:.3f} points"
    found = [f"{sentence}, over {summary.num_runs} seeds, all of them."]
    if is_lectures:
        found.append(
            f"The lecture's 100 runs: worst {LECTURE['worst']} %, median {LECTURE['median']} %, best "
            f"{LECTURE['best']} %. It trains on all 60,000 images; here {results[0]['num_test']:,} test the run and "
            "5,000 training images are set aside for validation."
        )
    if summary.median_interval is not None and summary.mean_interval is not None:
        (low, high), (mean_low, mean_high) = summary.median_interval, summary.mean_interval
        found.append(
            f"95 % intervals: median {low:.2f} to {high:.2f} % (bootstrap), mean {mean_low:.3f} to {mean_high:.3f} % "
            "(Student's t). They are about seeds on this one test set; what other test images would say is in each "
            "run's own interval."
        )
    if summary.deviation:
        runs = runs_to_tell_apart(0.1, summary.deviation)
        found.append(
            f"To tell another recipe of this spread apart that is better by 0.1 points takes about {runs} runs of each "
            "(80 % power at the 5 % level)."
        )
    return found


def _about_stacking(rates: dict[int, float]) -> list[str]:
    if len(rates) < 2:
        return []
    stacked = {size: rate for size, rate in rates.items() if size > 1}
    best = max(stacked, key=lambda size: stacked[size])
    return [
        f"Measured here before the first seed: one after another {rates[1]:,.0f} images/s, {best} seeds stacked "
        f"{stacked[best]:,.0f} images/s over all of them, {stacked[best] / rates[1]:.2f} times the rate."
    ]


def _about_looks(results: list[dict[str, Any]], ledger_path: Path) -> list[str]:
    num_looks = len(Ledger(ledger_path).entries(results[0]["dataset_sha256"]))
    return [f"Each seed was one look at the test set; the ledger of this folder of runs now holds {num_looks}."]


def _tables(summary: Summary, results: list[dict[str, Any]], errors: list[float], is_lectures: bool) -> list[Table]:
    names = ("worst", "median", "best", "mean", "deviation")
    ours = (summary.worst, summary.median, summary.best, summary.mean, summary.deviation)
    tables = [
        Table(
            name="summary",
            title="Summary, test error in %",
            header=("", *names),
            rows=[
                (f"{summary.num_runs} seeds here", *ours),
                *([("the lecture's 100", *LECTURE.values(), None, None)] if is_lectures else []),
            ],
        )
    ]
    if summary.deviation:
        deviation = summary.deviation
        tables.append(
            Table(
                name="runs-needed",
                title="Runs of each of two recipes to tell them apart",
                header=("difference of means, points", "runs of each"),
                rows=[(difference, runs_to_tell_apart(difference, deviation)) for difference in _DIFFERENCES],
            )
        )
    tables.append(
        Table(
            name="seeds",
            title="All seeds",
            header=("seed", "test error, %", "validation error, %", "training, s", "stacked with"),
            rows=[
                (
                    str(result["seed"]),
                    error,
                    100 * (1 - result["val_accuracy"]),
                    result["train_seconds"],
                    result["stacked"],
                )
                for result, error in zip(results, errors, strict=True)
            ],
        )
    )
    return tables


def _draw_histogram(errors: list[float], summary: Summary, num_test: int, is_lectures: bool) -> Figure:
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    marks = list(LECTURE.values()) if is_lectures else []
    low, high = min([*errors, *marks]), max([*errors, *marks])
    axes.hist(errors, bins=_bins(low, high, len(errors), num_test), color=LIGHT["train"], rwidth=0.94)
    top = axes.get_ylim()[1]
    for name, value in LECTURE.items() if is_lectures else ():
        axes.plot([value] * 2, [0, top * 1.09], color=LIGHT["wrong"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(value, top * 1.1, f"lecture's\n{name}", ha="center", va="bottom", color=LIGHT["wrong"], size=8)
    axes.plot([summary.median] * 2, [0, top], color=LIGHT["ink"], linewidth=1.2)
    axes.text(summary.median, top * 1.01, f"median {summary.median:.2f} ", ha="right", size=8, color=LIGHT["ink"])
    axes.set_ylim(0, top * 1.28)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("test error, %")
    axes.set_title("Seeds")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    return figure


def _bins(low: float, high: float, num_runs: int, num_test: int) -> list[float]:
    """Edges of equal bins, whole numbers of test images wide, so that none holds more possible errors than another."""
    image = 100 / num_test
    span = max(high - low, image)
    width = image * max(1, round(span / image / max(8, 2 * num_runs**0.5)))
    first = (np.floor(low / width) - 0.5) * width
    return [float(edge) for edge in np.arange(first, high + 1.5 * width, width)]
