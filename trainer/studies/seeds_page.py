"""The page of the study of seeds: its figure, tables and findings."""

import math
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.evaluation.entry import LedgerEntry
from trainer.evaluation.views import NUM_VIEWS, is_headline_averaged
from trainer.recipes import Recipe
from trainer.records.result import Result
from trainer.report.figures import LIGHT
from trainer.studies.page import CaptionedFigure, Column, Page, Table
from trainer.studies.plots import finish_axes, new_figure
from trainer.studies.summary import ErrorSummary, required_runs, summarize_errors

LECTURE = {"worst": 1.3, "median": 1.0, "best": 0.82}
"""Test errors in percent of the lecture's 100 runs (page 53), for the recipe `mnist` on MNIST."""
_DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Percentage points between two recipes, for the table of required runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResults:
    """All results of a setting.

    Args:
        results: the result of each seed of the study, by rising seed; at least one.
        diverged: the seeds that diverged and have no result.
        others: entries of the workspace's ledger for the same setting with weights from outside the study.
        num_evaluations: on this test set, in the ledger.
    """

    results: list[Result]
    diverged: list[int]
    others: list[LedgerEntry]
    num_evaluations: int


def make_page(recipe: Recipe, seeds: SeedResults) -> Page:
    """Returns the page. It counts all runs of the setting, those outside the study included."""
    results, others = seeds.results, seeds.others
    errors = [100 * result.test_errors / result.num_test for result in results]
    errors += [100 * entry.num_errors / entry.num_images for entry in others]
    summary = summarize_errors(errors)
    is_lecture = recipe.name == "mnist" and recipe.dataset == "mnist"
    return Page(
        title=f"{recipe.name} on {recipe.dataset}, from {len(results)} seeds",
        findings=[
            *_findings(summary, seeds, is_lecture),
            *_view_findings(recipe, seeds),
            *(f"Seed {result.seed}, warning: {text}." for result in results for text in result.warnings),
            *_side_by_side_findings(results),
            "Each run was evaluated on the test set once; the ledger of this folder of runs now holds "
            f"{seeds.num_evaluations} evaluation{'s' if seeds.num_evaluations != 1 else ''}.",
        ],
        figures=[
            CaptionedFigure(
                name="histogram",
                title="Test error by seed",
                caption="The number of runs by test error"
                + (", with the lecture's worst, median and best of 100 runs as dashed lines." if is_lecture else "."),
                draw=partial(_draw_histogram, errors, summary, results[0].num_test, is_lecture),
            )
        ],
        tables=_tables(summary, seeds, errors, is_lecture),
        result={
            "recipe": recipe.name,
            "dataset": recipe.dataset,
            "runs": len(errors),
            "seeds": [result.seed for result in results],
            "diverged": seeds.diverged,
            "runs_outside_the_study": len(others),
            "test_errors_percent": errors,
            "worst": summary.worst,
            "median": summary.median,
            "best": summary.best,
            "mean": summary.mean,
            "deviation": summary.std,
            "mean_interval": summary.mean_interval,
            "median_interval": summary.median_interval,
        },
    )


def _findings(summary: ErrorSummary, seeds: SeedResults, is_lecture: bool) -> list[str]:
    results, others, diverged = seeds.results, seeds.others, seeds.diverged
    found = [_headline(summary)]
    if others:
        found.append(
            f"{len(others)} of these runs {'were' if len(others) > 1 else 'was'} made outside this study, with the "
            "same setting and other weights (another seed, number of ranks or kind of machine). They are in the ledger "
            "of this folder of runs and therefore count."
        )
    if diverged:
        found.append(
            f"{len(diverged)} of {len(diverged) + len(results)} seeds diverged and have no test error: "
            f"{', '.join(map(str, diverged))}. The figures are those of the others."
        )
    if is_lecture:
        set_aside = "" if results[0].val_accuracy is None else "; here, 5,000 of them are set aside for validation"
        found.append(
            f"The lecture's 100 runs: worst {LECTURE['worst']} %, median {LECTURE['median']} %, best "
            f"{LECTURE['best']} %. The lecture trains on all 60,000 images{set_aside}, and {results[0].num_test:,} "
            "others test the run."
        )
    if summary.mean_interval is not None:
        (low, high), median = summary.mean_interval, summary.median_interval
        of_median = "" if median is None else f", median {median[0]:.2f} to {median[1]:.2f} % (between two of the runs)"
        found.append(
            f"95 % intervals for other seeds on this test set: mean {low:.3f} to {high:.3f} % (Student's t)"
            f"{of_median}. The interval for other test images is in each run's own report."
        )
    if summary.std:
        runs = required_runs(0.1, summary.std)
        found.append(
            f"To detect that another recipe with this spread is better by 0.1 points takes about {runs:,} runs of each "
            "(power 80 %, level 5 %)."
        )
    return found


def _view_findings(recipe: Recipe, seeds: SeedResults) -> list[str]:
    """Returns the figures of several views, and which of the figures above are such means, from version 0.1."""
    views = recipe.test_time_views
    if views == "one":
        return []
    runs: list[tuple[int | None, int]] = [(run.test_errors_with_views, run.num_test) for run in seeds.results]
    runs += [(entry.num_errors_with_views, entry.num_images) for entry in seeds.others]
    errors = [100 * wrong / num_images for wrong, num_images in runs if wrong is not None]
    num_averaged = sum(is_headline_averaged(views, wrong) for wrong, _ in runs)
    found = []
    if errors:
        found.append(
            f"With {NUM_VIEWS[views]} views of each image instead of one: {_headline(summarize_errors(errors))}"
        )
    if num_averaged:
        found.append(
            f"Version 0.1 evaluated {num_averaged} of these runs, with {NUM_VIEWS[views]} views alone: their figures "
            "above are of these views, not of one."
        )
    return found


def _headline(summary: ErrorSummary) -> str:
    std = "" if summary.std is None else f", standard deviation {summary.std:.3f} points"
    return (
        f"Test error: worst {summary.worst:.2f} %, median {summary.median:.2f} %, best {summary.best:.2f} %; "
        f"mean {summary.mean:.3f} %{std}, over {summary.num_runs} run{'s' if summary.num_runs > 1 else ''}."
    )


def _side_by_side_findings(results: list[Result]) -> list[str]:
    most = max(result.stacked or 1 for result in results)
    if most == 1:
        return []
    return [f"Up to {most} seeds were trained side by side, each by its own step, to the weights that it gets alone."]


def _tables(summary: ErrorSummary, seeds: SeedResults, errors: list[float], is_lecture: bool) -> list[Table]:
    names = ("worst", "median", "best", "mean", "standard deviation")
    ours = (summary.worst, summary.median, summary.best, summary.mean, summary.std)
    tables = [
        Table(
            name="summary",
            title="Summary, test error in %",
            columns=(Column(""), *(Column(name, 3) for name in names)),
            rows=[
                (f"{summary.num_runs} runs here", *ours),
                *([("the lecture's 100", *LECTURE.values(), None, None)] if is_lecture else []),
            ],
        )
    ]
    if summary.std:
        std = summary.std
        tables.append(
            Table(
                name="runs-needed",
                title="Runs of each of two recipes that detect a difference",
                columns=(Column("difference of means, points", 2), Column("runs of each")),
                rows=[(difference, required_runs(difference, std)) for difference in _DIFFERENCES],
            )
        )
    return [*tables, _seeds_table(seeds, errors)]


def _seeds_table(seeds: SeedResults, errors: list[float]) -> Table:
    num_seeds = len(seeds.results)
    return Table(
        name="seeds",
        title="All seeds",
        columns=(
            Column("seed"),
            Column("test error, %", 2),
            Column("validation error, %", 2),
            Column("training, s", 1),
            Column("seeds side by side"),
        ),
        rows=[
            *(
                (str(r.seed), error, _validation_error(r), r.train_seconds, r.stacked or 1)
                for r, error in zip(seeds.results, errors[:num_seeds], strict=True)
            ),
            *((f"{seed}, diverged", None, None, None, None) for seed in seeds.diverged),
            *(
                (f"{entry.seed}, {entry.run}, outside the study", error, None, None, None)
                for entry, error in zip(seeds.others, errors[num_seeds:], strict=True)
            ),
        ],
    )


def _validation_error(result: Result) -> float | None:
    """Returns the validation error in percent, None without validation images."""
    return None if result.val_accuracy is None else 100 * (1 - result.val_accuracy)


def _draw_histogram(
    errors: list[float], summary: ErrorSummary, num_test: int, is_lecture: bool, *, narrow: bool
) -> Figure:
    figure = new_figure(7.2, 3.8, narrow=narrow)
    axes = figure.subplots()
    marks = list(LECTURE.values()) if is_lecture else []
    low, high = min([*errors, *marks]), max([*errors, *marks])
    axes.hist(errors, bins=_bins(low, high, len(errors), num_test), color=LIGHT["train"], rwidth=0.94)
    top = axes.get_ylim()[1]
    # Our label has its own row below the lecture's, above all lines: the two medians may be equal.
    for name, value in LECTURE.items() if is_lecture else ():
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
    finish_axes(axes)
    return figure


def _bins(low: float, high: float, num_runs: int, num_test: int) -> list[float]:
    """Returns the edges of equal bins, each a whole number of test images wide, halfway between two possible errors.

    Otherwise some bins would hold more of the possible errors than others.
    """
    image = 100 / num_test
    size = max(1, round(max(high - low, image) / image / max(8, 2 * num_runs**0.5)))
    first, last = size * math.floor(low / image / size), math.ceil(high / image)
    return [(count - 0.5) * image for count in range(first, last + size + 1, size)]
