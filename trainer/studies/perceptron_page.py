"""The page of the perceptron study."""

from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.report.figures import LIGHT
from trainer.studies.page import CaptionedFigure, Column, Page, Table
from trainer.studies.plots import finish_axes, new_figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """A perceptron on points.

    Args:
        points: float64 `[N, 2]`.
        sides: -1 or 1 `[N]`.
        mistakes: in each pass.
        lines: the weights after each pass, float64 `[passes, 3]`.
    """

    points: torch.Tensor
    sides: torch.Tensor
    mistakes: list[int]
    lines: torch.Tensor

    @property
    def is_solved(self) -> bool:
        return self.mistakes[-1] == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """Two networks on T and C.

    Args:
        curves: by network, accuracies after each epoch, at places that it was shown and at others, `[epochs, 2]`.
        num_weights: by network.
        filters: the shared weights, float32 `[filters, 3, 3]`.
    """

    curves: dict[str, torch.Tensor]
    num_weights: dict[str, int]
    filters: torch.Tensor


_NAMES = {"shared": "shared 3x3 weights", "own": "each place's own weights"}


def make_page(separable: Points, exclusive_or: Points, letters: Letters) -> Page:
    """Returns the page."""
    last = {name: curve[-1].tolist() for name, curve in letters.curves.items()}
    solved = (
        f"makes no mistake from pass {len(separable.mistakes)} on" if separable.is_solved else "still makes mistakes"
    )
    return Page(
        title="A perceptron, and T and C told apart",
        findings=[
            "At places that it was never shown, the network of shared weights is right in "
            f"{100 * last['shared'][1]:.0f} % of the images, the one of weights of each place's own in "
            f"{100 * last['own'][1]:.0f} %.",
            f"On {len(separable.points)} points that a line separates, the perceptron {solved}. On exclusive or it "
            f"makes {exclusive_or.mistakes[-1]} mistakes in pass {len(exclusive_or.mistakes)}: no line is right there.",
            "Points and letters are ours: our notes of the lecture have names and years, and no data.",
        ],
        figures=_figures(separable, exclusive_or, letters),
        tables=[
            Table(
                name="letters",
                title="T or C, at the end",
                columns=(
                    Column("network"),
                    Column("weights"),
                    Column("right at shown places, %", 1),
                    Column("right at others, %", 1),
                ),
                rows=[
                    (_NAMES[name], letters.num_weights[name], 100 * values[0], 100 * values[1])
                    for name, values in last.items()
                ],
            )
        ],
        result={
            "perceptron_mistakes": separable.mistakes,
            "exclusive_or_mistakes": exclusive_or.mistakes,
            "letters": last,
        },
    )


def _figures(separable: Points, exclusive_or: Points, letters: Letters) -> list[CaptionedFigure]:
    return [
        CaptionedFigure(
            name="points",
            title="The perceptron's line",
            caption="The points, the line after each pass (pale) and the last one.",
            draw=partial(_draw_points, separable),
        ),
        CaptionedFigure(
            name="passes",
            title="Mistakes in each pass",
            caption="Points that were on the wrong side, each of which moved the line.",
            draw=partial(_draw_passes, separable, exclusive_or),
        ),
        CaptionedFigure(
            name="letters",
            title="T or C",
            caption="Accuracy after each epoch at places that the networks were shown, and at others.",
            draw=partial(_draw_letters, letters),
        ),
        CaptionedFigure(
            name="filters",
            title="The shared weights",
            caption="Each set of 3x3 weights after the training: purple is positive, orange negative.",
            draw=partial(_draw_filters, letters.filters),
        ),
    ]


def _draw_points(points: Points, *, narrow: bool) -> Figure:
    figure = new_figure(5.2, 4.2, narrow=narrow)
    axes = figure.subplots()
    for side, colour, marker in ((1, LIGHT["train"], "o"), (-1, LIGHT["wrong"], "s")):
        chosen = points.points[points.sides == side]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=18, color=colour, marker=marker, linewidths=0)
    for number, (a, b, c) in enumerate(points.lines.tolist(), start=1):
        is_last = number == len(points.lines)
        if b:
            ends = [-1.1, 1.1]
            colour = LIGHT["ink"] if is_last else LIGHT["rule"]
            axes.plot(ends, [-(a * x + c) / b for x in ends], color=colour, linewidth=1.6 if is_last else 1)
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
    finish_axes(axes, "both")
    return figure


def _draw_passes(separable: Points, exclusive_or: Points, *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 2.8, narrow=narrow)
    axes = figure.subplots()
    for points, colour, name in (
        (separable, LIGHT["train"], "points that a line separates"),
        (exclusive_or, LIGHT["wrong"], "exclusive or"),
    ):
        axes.plot(range(1, len(points.mistakes) + 1), points.mistakes, color=colour, marker="o", label=name)
    axes.set(xlabel="pass")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_title("Mistakes")
    finish_axes(axes)
    axes.legend(loc="upper right")
    return figure


def _draw_letters(letters: Letters, *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 3.2, narrow=narrow)
    axes = figure.subplots()
    for name, colour in (("shared", LIGHT["train"]), ("own", LIGHT["wrong"])):
        curve = 100 * letters.curves[name]
        epochs = range(1, len(curve) + 1)
        axes.plot(epochs, curve[:, 1], color=colour, label=f"{_NAMES[name]}, other places")
        axes.plot(epochs, curve[:, 0], color=colour, linestyle=(0, (4, 3)), label=f"{_NAMES[name]}, shown places")
    axes.set(xlabel="epoch", ylim=(0, 103))
    axes.set_title("Accuracy, %")
    finish_axes(axes)
    axes.legend(loc="center right")
    return figure


def _draw_filters(filters: torch.Tensor, *, narrow: bool) -> Figure:
    figure = new_figure(1.5 * len(filters), 1.7, narrow=narrow)
    size = float(filters.abs().max())
    for axes, values in zip(figure.subplots(1, len(filters), squeeze=False)[0], filters, strict=True):
        axes.imshow(values.numpy(), cmap="PuOr", vmin=-size, vmax=size)
        axes.set(xticks=[], yticks=[])
    return figure
