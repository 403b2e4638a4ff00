"""The page of a sweep: its figure, table and findings."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from trainer.recipes import Recipe
from trainer.report.figures import LIGHT
from trainer.studies.page import CaptionedFigure, Column, Page, Table
from trainer.studies.plots import finish_axes, new_figure
from trainer.studies.search_space import Candidate, describe_candidate

_LONGEST_NAME = 44
"""Characters of a candidate's values that leave the figure room for its points, on a phone, too."""


def make_page(
    base: Recipe,
    candidates: list[Candidate],
    results: list[dict[str, Any]],
    command_of: Callable[[Candidate], str],
) -> Page:
    """Returns the page. Candidates are ranked by the mean of their accuracies, and equal ones by that of their losses.

    Args:
        results: the content of `candidate.json` of each trial, with the candidate's `number`.
        command_of: returns the command of a training run with a candidate's values.
    """
    trials = [[result for result in results if result["number"] == number] for number in range(len(candidates))]
    trained = [[result for result in found if not result["diverged"]] for found in trials]
    accuracies = [[result["val_accuracy"] for result in found] for found in trained]
    num_seeds = len(trials[0])
    # A candidate that diverged from one seed has no mean: a mean over its other seeds would flatter it.
    means = [statistics.mean(found) if len(found) == num_seeds else None for found in accuracies]

    def by_rank(number: int) -> tuple[float, float]:
        mean = means[number]
        if mean is None:
            return math.inf, 0.0  # last, after a candidate without a right answer, too
        return -mean, statistics.mean(result["val_loss"] for result in trained[number])

    order = sorted(range(len(candidates)), key=by_rank)
    best, highest = order[0], means[order[0]]
    names = [describe_candidate(candidates[number]) for number in order]
    if is_long := max(map(len, names)) > _LONGEST_NAME:
        names = [f"rank {rank}" for rank in range(1, len(order) + 1)]
    return Page(
        title=f"{base.name} on {base.dataset}: {len(candidates)} candidates",
        findings=_findings(candidates[best], means, command_of(candidates[best])),
        figures=[
            CaptionedFigure(
                name="candidates",
                title="Validation accuracy, best first",
                caption=f"A row for each candidate: its mean over {num_seeds} seed{'s' if num_seeds > 1 else ''}, and "
                f"a small dot for each seed.{' The table has the values of each rank.' if is_long else ''}",
                draw=partial(
                    _draw_candidates,
                    names,
                    [[100 * accuracy for accuracy in accuracies[number]] for number in order],
                    [means[number] for number in order],
                ),
            )
        ],
        tables=[
            Table(
                name="candidates",
                title="Candidates",
                columns=(
                    Column("rank"),
                    *(Column(name) for name in candidates[0]),
                    Column("validation accuracy, %", 2),
                    Column("training, s", 1),
                ),
                rows=[
                    (
                        str(rank),
                        *(str(value) for value in candidates[number].values()),
                        "diverged" if (mean := means[number]) is None else 100 * mean,
                        sum(result["train_seconds"] for result in trials[number]) / num_seeds,
                    )
                    for rank, number in enumerate(order, start=1)
                ],
            )
        ],
        result={
            "recipe": base.name,
            "best": None if highest is None else candidates[best],
            "command": None if highest is None else command_of(candidates[best]),
            "val_accuracy": highest,
            "candidates": results,
        },
    )


def _findings(best: Candidate, means: list[float | None], command: str) -> list[str]:
    """Returns the findings.

    Args:
        best: the first candidate of the ranking.
        means: the mean validation accuracy of each candidate; None where a seed diverged.
        command: trains with the best values.
    """
    accuracies = [mean for mean in means if mean is not None]
    if not accuracies:
        return ["Every candidate diverged from at least one seed, so that none is the best."]
    findings = [
        f"Best on validation images: {describe_candidate(best)}, accuracy {100 * max(accuracies):.2f} %.",
        f"This accuracy is the highest of {len(means)} and therefore optimistic. For an honest estimate, train with "
        "these values and evaluate on the test set; this study used no test image.",
        f"To train with these values: {command}",
    ]
    if num_diverged := means.count(None):
        findings.append(
            f"{num_diverged} of {len(means)} candidates diverged from at least one seed and are ranked last."
        )
    return findings


def _draw_candidates(
    names: list[str], accuracies: list[list[float]], means: list[float | None], *, narrow: bool
) -> Figure:
    """Draws a row for each candidate, named on the left; in the narrow figure, above its row."""
    height = 0.5 if narrow else 0.3
    figure = new_figure(7.2, 1.1 + height * len(names), narrow=narrow)
    axes = figure.subplots()
    for row, (found, mean) in enumerate(zip(accuracies, means, strict=True)):
        axes.plot(found, [row] * len(found), color=LIGHT["train"], marker=".", linestyle="", alpha=0.5)
        if mean is not None:
            axes.plot([100 * mean], [row], color=LIGHT["wrong"], marker="o", linestyle="")
        if narrow:
            axes.text(0.01, row - 0.3, names[row], transform=axes.get_yaxis_transform(), va="center", size=8)
    axes.set_yticks(range(len(names)), [""] * len(names) if narrow else names)
    axes.set_ylim(len(names) - 0.5, -0.7 if narrow else -0.5)
    axes.set_xlabel("validation accuracy, %")
    finish_axes(axes, grid="both")
    return figure
