"""Sizes and axes that the figures of all studies share.

Each figure is drawn twice: wide for screens and for files, narrow for phones.
"""

from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

NARROW_WIDTH = 3.8
"""Inches: 365 pixels, so that a phone shows text at its full size."""


def new_figure(width: float, height: float, *, narrow: bool, narrow_height: float | None = None) -> Figure:
    """Creates an empty figure.

    Args:
        width: of the wide figure, in inches.
        height: of the wide figure, in inches.
        narrow: creates the narrow figure instead.
        narrow_height: of the narrow figure, in inches; `height` by default.
    """
    size = (NARROW_WIDTH, narrow_height or height) if narrow else (width, height)
    return Figure(figsize=size, layout="constrained")


def finish_axes(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Adds grid lines and removes tick marks."""
    axes.grid(axis=grid)
    axes.tick_params(which="both", length=0)


def use_log_scale(axes: Axes, name: Literal["x", "y"], ticks: list[float] | None = None) -> None:
    """Makes an axis logarithmic and labels it with plain numbers. Call it after everything is plotted.

    matplotlib labels logarithmic axes with formulas, which our style does not parse and would print as they are.

    Args:
        ticks: values to label; by default the powers of ten, and 2 and 5 times them where there is room.
    """
    axes.set(**{f"{name}scale": "log"})
    axis: Axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
    subs = (1, 2, 5) if high / low < (1e3 if name == "x" else 1e5) else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if ticks is None else FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
