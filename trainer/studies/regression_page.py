"""The page of the regression study: its figures, table and findings."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from trainer.report.figures import LIGHT
from trainer.studies.page import CaptionedFigure, Cell, Column, Page, Table
from trainer.studies.plots import finish_axes, new_figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`pressure = slope * age + intercept`, in mmHg and years."""

    slope: float
    intercept: float


def make_page(ages: torch.Tensor, pressures: torch.Tensor, closed: Line, path: list[Line], truth: Line) -> Page:
    """Returns the page.

    Args:
        ages, pressures: float64 `[N]`, years and mmHg.
        closed: the line of least squares.
        path: the line after each epoch of SGD.
        truth: the line that generated the data.
    """
    last = path[-1]
    residual = float((pressures - closed.slope * ages - closed.intercept).square().mean().sqrt())
    gap = max(abs((last.slope - closed.slope) * age + last.intercept - closed.intercept) for age in (10, 80))
    rows: list[tuple[Cell, ...]] = [
        ("the true line", truth.slope, truth.intercept),
        ("least squares, closed form", closed.slope, closed.intercept),
        (f"SGD, {len(path):,} epochs", last.slope, last.intercept),
    ]
    return Page(
        title="Blood pressure by age: a line, two ways (generated data)",
        findings=[
            f"Least squares finds {closed.slope:.3f} mmHg a year, SGD {last.slope:.3f}. Between 10 and 80 years the "
            f"two lines differ by at most {gap:.2g} mmHg.",
            f"The data are generated and are no measurements: {len(ages):,} people on a line of {truth.slope} mmHg a "
            f"year, with noise. The standard deviation around the fitted line is {residual:.1f} mmHg.",
        ],
        figures=[
            CaptionedFigure(
                name="line",
                title="The line",
                caption="Systolic blood pressure by age: generated points, the line of least squares and SGD's.",
                draw=partial(_draw_line, ages, pressures, closed, last),
            ),
            CaptionedFigure(
                name="sgd",
                title="The path of SGD",
                caption="The slope after each epoch of SGD, and the slope of least squares.",
                draw=partial(_draw_path, closed, path),
            ),
        ],
        tables=[
            Table(
                name="lines",
                title="The lines",
                columns=(Column("line"), Column("slope, mmHg a year", 3), Column("intercept, mmHg", 3)),
                rows=rows,
            )
        ],
        result={
            "closed_form": [closed.slope, closed.intercept],
            "sgd": [last.slope, last.intercept],
            "largest_gap_mmhg": gap,
        },
    )


def _draw_line(ages: torch.Tensor, pressures: torch.Tensor, closed: Line, sgd: Line, *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 4.2, narrow=narrow)
    axes = figure.subplots()
    axes.scatter(ages, pressures, s=16, color=LIGHT["train"], alpha=0.8, linewidths=0, label="people (generated)")
    ends = np.array([10.0, 80.0])
    axes.plot(ends, closed.slope * ends + closed.intercept, color=LIGHT["wrong"], label="least squares")
    dashes = (0, (4, 4))
    axes.plot(ends, sgd.slope * ends + sgd.intercept, color=LIGHT["ink"], linestyle=dashes, label="SGD, on top of it")
    axes.set(xlim=(8, 82), ylim=(80, 240), xlabel="age, years")
    axes.set_title("Systolic blood pressure, mmHg")
    finish_axes(axes)
    axes.legend(loc="upper left")
    return figure


def _draw_path(closed: Line, path: list[Line], *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 2.8, narrow=narrow)
    axes = figure.subplots()
    axes.axhline(closed.slope, color=LIGHT["wrong"], label="least squares")
    axes.plot(range(1, len(path) + 1), [line.slope for line in path], color=LIGHT["train"], label="SGD")
    axes.set(xlim=(0, len(path)), xlabel="epoch")
    axes.set_ylim(bottom=0)
    axes.set_title("Slope, mmHg a year")
    finish_axes(axes)
    axes.legend(loc="lower right")
    return figure
