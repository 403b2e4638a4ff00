"""The study of seeds: its figure, tables and findings."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.recipes import Recipe
from trainer.report.figures import LIGHT
from trainer.studies.page import Page, Picture, Table
from trainer.studies.summary import Summary, runs_to_tell_apart, summarize

LECTURE = {"worst": 1.3, "median": 1.0, "best": 0.82}
"""Test errors in percent of 100 runs (page 53), for the recipe `mnist` on MNIST."""
_DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Percentage points between two recipes, for the table of runs needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a recipe's seeds: all of it, because the best of some says nothing.

    Args:
        results: `result.json` of each seed of the study, by rising seed; at least one.
        diverged: the seeds that ended without weights to look at.
        others: looks of the workspace's ledger with the same setting, but with weights that are none of the study's.
        num_looks: at this test set, in the ledger.
    """

    results: list[dict[str, Any]]
    diverged: list[int]
    others: list[dict[str, Any]]
    num_looks: int


def make_page(recipe: Recipe, outcome: Outcome, rates: dict[int, float]) -> Page:
    """Everything that the study says, from all runs of the setting, none left out.

    Args:
        rates: images a second by size of stack, 0 where not measured.
    """
    results, others = outcome.results, outcome.others
    errors = [100 * result["test_errors"] / result["num_test"] for result in results]
    errors += [100 * look["num_errors"] / look["num_images"] for look in others]
    summary = summarize(errors)
    is_lectures = recipe.name == "mnist" and recipe.dataset == "mnist"
    return Page(
        title=f"{recipe.name} on {recipe.dataset}, from {len(results)} seeds",
        findings=[
            *_findings(summary, outcome, is_lectures),
            *_about_stacking(rates, results),
            f"Each run was one look at the test set; the ledger of this folder of runs now holds {outcome.num_looks}.",
        ],
        pictures=[
            Picture(
                name="histogram",
                title="Test error by seed",
                text="How many runs ended at which test error"
                + (", with the lecture's worst, median and best of 100 runs as dashed lines." if is_lectures else "."),
                figure=_draw_histogram(errors, summary, results[0]["num_test"], is_lectures),
            )
        ],
        tables=_tables(summary, outcome, errors, is_lectures),
        result={
            "recipe": recipe.name,
            "dataset": recipe.dataset,
            "runs": len(errors),
            "seeds": [result["seed"] for result in results],
            "diverged": outcome.diverged,
            "runs_outside_the_study": len(others),
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


def _findings(summary: Summary, outcome: Outcome, is_lectures: bool) -> list[str]:
    sentence = (
        f"Test error: worst {summary.worst:.2f} %, median {summary.median:.2f} %, best {summary.best:.2f} %; mean "
        f"{summary.mean:.3f} %"
    )
    if summary.deviation is not None:
        sentence += f", deviation {summary.deviation:.3f} points"
    results, others = outcome.results, outcome.others
    found = [f"{sentence}, over {summary.num_runs} run{'s' if summary.num_runs > 1 else ''}."]
    if others:
        found.append(
            f"{len(others)} of these runs {'were' if len(others) > 1 else 'was'} made outside this study, with the "
            "same setting and other weights (another seed, number of ranks or kind of machine): the ledger of this "
            "folder of runs has them, and so they count."
        )
    if outcome.diverged:
        found.append(
            f"{len(outcome.diverged)} of {len(outcome.diverged) + len(results)} seeds diverged and have no test error: "
            f"{', '.join(map(str, outcome.diverged))}. The figures are those of the others."
        )
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
            "(Student's t). They are about seeds on this one test set, each interval alone; what other test images "
            "would say is in each run's own interval."
        )
    if summary.deviation:
        runs = runs_to_tell_apart(0.1, summary.deviation)
        found.append(
            f"To tell another recipe of this spread apart that is better by 0.1 points takes about {runs} runs of each "
            "(80 % power at the 5 % level)."
        )
    return found


def _about_stacking(rates: dict[int, float], results: list[dict[str, Any]]) -> list[str]:
    found = []
    if len(rates) > 1:
        stacked = {size: rate for size, rate in rates.items() if size > 1}
        best = max(stacked, key=lambda size: stacked[size])
        found.append(
            f"Measured here before the first seed: one after another {rates[1]:,.0f} images/s, {best} seeds stacked "
            f"{stacked[best]:,.0f} images/s over all of them, {stacked[best] / rates[1]:.2f} times the rate."
        )
    if any(result["stacked"] > 1 for result in results):
        precision = results[0]["precision"]
        found.append(
            "Seeds that were stacked equal their lone runs up to rounding: to 1e-6 after some steps in float32"
            + ("." if precision == "float32" else f"; here in {precision}, whose rounding is coarser, not as closely.")
        )
    return found


def _tables(summary: Summary, outcome: Outcome, errors: list[float], is_lectures: bool) -> list[Table]:
    num_seeds = len(outcome.results)
    names = ("worst", "median", "best", "mean", "deviation")
    ours = (summary.worst, summary.median, summary.best, summary.mean, summary.deviation)
    tables = [
        Table(
            name="summary",
            title="Summary, test error in %",
            header=("", *names),
            rows=[
                (f"{summary.num_runs} runs here", *ours),
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
                *(
                    (str(r["seed"]), error, 100 * (1 - r["val_accuracy"]), r["train_seconds"], r["stacked"])
                    for r, error in zip(outcome.results, errors[:num_seeds], strict=True)
                ),
                *((f"{seed}, diverged", None, None, None, None) for seed in outcome.diverged),
                *(
                    (f"{look['seed']}, {look['run']}, outside the study", error, None, None, None)
                    for look, error in zip(outcome.others, errors[num_seeds:], strict=True)
                ),
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
    # Our label has a row of its own below the lecture's, above all lines: the two medians may be one and the same.
    for name, value in LECTURE.items() if is_lectures else ():
        axes.plot([value] * 2, [0, top], color=LIGHT["wrong"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(value, top * 1.1, f"lecture's\n{name}", ha="center", va="bottom", color=LIGHT["wrong"], size=8)
    axes.plot([summary.median] * 2, [0, top], color=LIGHT["ink"], linewidth=1.2)
    axes.text(
        summary.median, top * 1.02, f"median {summary.median:.2f}", ha="center", va="bottom", color=LIGHT["ink"], size=8
    )
    axes.set_ylim(0, top * 1.28)
    axes.set_yticks([tick for tick in MaxNLocator(nbins=6, integer=True).tick_values(0, top) if tick <= top])
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
