"""The page of a sweep: its figure, table and findings."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Tried:
    """A candidate with its trials, one from each seed."""

    candidate: Candidate
    trials: list[dict[str, Any]]

    @property
    def accuracies(self) -> list[float]:
        """Those of the trials that did not diverge."""
        return [trial["val_accuracy"] for trial in self.trials if not trial["diverged"]]

    @property
    def mean(self) -> float | None:
        """The mean accuracy; None if a trial diverged: a mean over the others would flatter the candidate."""
        return statistics.mean(self.accuracies) if len(self.accuracies) == len(self.trials) else None

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts by accuracy, then by loss. Those without a mean are last, after one without a right answer, too."""
        if self.mean is None:
            return math.inf, 0.0
        return -self.mean, statistics.mean(trial["val_loss"] for trial in self.trials)


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
    trials_of = [[result for result in results if result["number"] == number] for number in range(len(candidates))]
    ranking = sorted(map(_Tried, candidates, trials_of), key=lambda tried: tried.rank)
    best, num_seeds = ranking[0], len(trials_of[0])
    command = command_of(best.candidate)
    names = [describe_candidate(tried.candidate) for tried in ranking]
    if is_long := max(map(len, names)) > _LONGEST_NAME:
        names = [f"rank {rank}" for rank in range(1, len(ranking) + 1)]
    return Page(
        title=f"{base.name} on {base.dataset}: {len(candidates)} candidates",
        findings=_findings(ranking, command),
        figures=[
            CaptionedFigure(
                name="candidates",
                title="Validation accuracy, best first",
                caption=f"A row for each candidate: its mean over {num_seeds} seed{'s' if num_seeds > 1 else ''}, and "
                f"a small dot for each seed.{' The table has the values of each rank.' if is_long else ''}",
                draw=partial(_draw_candidates, names, ranking),
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
                        *(str(value) for value in tried.candidate.values()),
                        "diverged" if tried.mean is None else 100 * tried.mean,
                        sum(trial["train_seconds"] for trial in tried.trials) / num_seeds,
                    )
                    for rank, tried in enumerate(ranking, start=1)
                ],
            )
        ],
        result={
            "recipe": base.name,
            "best": None if best.mean is None else best.candidate,
            "command": None if best.mean is None else command,
            "val_accuracy": best.mean,
            "candidates": results,
        },
    )


def _findings(ranking: list[_Tried], command: str) -> list[str]:
    """Returns the findings.

    Args:
        command: trains with the best values.
    """
    best = ranking[0]
    if best.mean is None:
        return ["Every candidate diverged from at least one seed, so that none is the best."]
    findings = [
        f"Best on validation images: {describe_candidate(best.candidate)}, accuracy {100 * best.mean:.2f} %.",
        f"This accuracy is the highest of {len(ranking)} and therefore optimistic. For an honest estimate, train with "
        "these values and evaluate on the test set; this study used no test image.",
        f"To train with these values: {command}",
    ]
    if num_diverged := sum(tried.mean is None for tried in ranking):
        findings.append(
            f"{num_diverged} of {len(ranking)} candidates diverged from at least one seed and are ranked last."
        )
    return findings


def _draw_candidates(names: list[str], ranking: list[_Tried], *, narrow: bool) -> Figure:
    """Draws a row for each candidate, named on the left; in the narrow figure, above its row."""
    height = 0.5 if narrow else 0.3
    figure = new_figure(7.2, 1.1 + height * len(names), narrow=narrow)
    axes = figure.subplots()
    for row, tried in enumerate(ranking):
        accuracies = [100 * accuracy for accuracy in tried.accuracies]
        axes.plot(accuracies, [row] * len(accuracies), color=LIGHT["train"], marker=".", linestyle="", alpha=0.5)
        if tried.mean is not None:
            axes.plot([100 * tried.mean], [row], color=LIGHT["wrong"], marker="o", linestyle="")
        if narrow:
            axes.text(0.01, row - 0.3, names[row], transform=axes.get_yaxis_transform(), va="center", size=8)
    axes.set_yticks(range(len(names)), [""] * len(names) if narrow else names)
    axes.set_ylim(len(names) - 0.5, -0.7 if narrow else -0.5)
    axes.set_xlabel("validation accuracy, %")
    finish_axes(axes, grid="both")
    return figure
