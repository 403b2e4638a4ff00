"""Draws a report's figures with matplotlib, without pyplot: it needs no display and changes no global state.

The same numbers give the same bytes: no dates, no random ids. This module knows neither files nor HTML.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from trainer.records.mistakes import Mistake

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2023",
    "muted": "#5b6066",
    "rule": "#dadde0",
    "train": "#1668a8",
    "wrong": "#b34e0a",
}
"""Blue is training and orange validation or a mistake, because colour-blind people can tell them apart."""
DARK = {
    "paper": "#17191b",
    "ink": "#e8e7e4",
    "muted": "#a5aaaf",
    "rule": "#3a3f44",
    "train": "#69b3ee",
    "wrong": "#f1a45f",
}

MAX_WRITTEN_CLASSES = 30
"""With more classes a confusion matrix has dots instead of numbers."""
_MAX_MARKED_EPOCHS = 40
_TILES_PER_ROW = 8
_FONTS = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
_STYLE: Any = {  # matplotlib's type of this lists every setting, and changes with its version
    "svg.hashsalt": "convoy",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be named $x
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The data of the learning curves.

    Args:
        steps: lines of kind `step` in `metrics.jsonl`.
        epochs: lines of kind `epoch`.
        lr_factors: one for each step of the run.
        images_per_epoch: training images.
    """

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    lr_factors: list[float]
    images_per_epoch: float

    @property
    def steps_per_epoch(self) -> float:
        return float(self.epochs[-1]["step"] / self.epochs[-1]["epoch"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportedMistake(Mistake):
    """A test image that the network classifies wrongly.

    Args:
        index: in the test set, counted from 0.
        label_probability: the probability of the right class.
    """

    index: int
    label_probability: float


@contextmanager
def style() -> Iterator[None]:
    """Context in which to draw and encode figures: sets their style."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Class names may be in any script; the PNG has boxes for characters that the font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def to_svg(figure: Figure, *, transparent: bool = False) -> str:
    """Returns the drawing as SVG, the same bytes for the same drawing."""
    file = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    if figure.axes and (layout := figure.get_layout_engine()) is not None:
        FigureCanvasSVG(figure)  # its text is measured
        layout.execute(figure)
        figure.set_layout_engine(None)  # with an engine, even "none", `savefig` draws everything twice
    figure.savefig(file, format="svg", metadata=nothing, transparent=transparent)
    return file.getvalue().replace("'DejaVu Sans', sans-serif", _FONTS)


def to_png(figure: Figure) -> bytes:
    """Returns the drawing as PNG for slides: on white, at twice the resolution of a screen."""
    file = io.BytesIO()
    options = {"compress_level": 4}  # takes a third of the time for a tenth more bytes
    figure.savefig(
        file, format="png", dpi=144, metadata={"Software": None}, facecolor=LIGHT["paper"], pil_kwargs=options
    )
    return file.getvalue()


def to_dark(svg: str) -> str:
    """Returns the drawing in the colours of dark pages."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, DARK[name])
    return svg


def draw_curves(curves: Curves, *columns: str) -> Figure:
    """Returns the learning curves.

    Args:
        columns: `loss` (above the learning rate) and `accuracy` (above the throughput).
    """
    draw: dict[str, tuple[Callable[[Axes, Curves], None], Callable[[Axes, Curves], None]]] = {
        "loss": (_draw_loss, _draw_lr_factor),
        "accuracy": (_draw_accuracy, _draw_throughput),
    }
    figure = Figure(figsize=(4.2 * len(columns), 3.7), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, squeeze=False, height_ratios=[3.4, 1])
    for number, column in enumerate(columns):
        upper, lower = axes[0, number], axes[1, number]
        draw[column][0](upper, curves)
        draw[column][1](lower, curves)
        for axis in (upper, lower):
            axis.grid(axis="y")
            axis.tick_params(which="both", length=0)
        lower.set_xlabel("epoch")
        lower.set_xlim(0, curves.epochs[-1]["epoch"] * 1.015)
        lower.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    return figure


def draw_confusion(confusion: npt.NDArray[np.int64], classes: tuple[str, ...]) -> Figure:
    """Returns the confusion matrix, labels in rows, predictions in columns.

    Only mistakes are coloured; on a scale with the correct predictions they would all be pale.
    """
    num_classes = len(classes)
    written = num_classes <= MAX_WRITTEN_CLASSES
    side = 1.6 + ((0.42 if num_classes <= 12 else 0.34) * num_classes if written else 6)
    mistakes = confusion * (1 - np.eye(num_classes, dtype=np.int64))
    figure = Figure(figsize=(max(3.6, side), max(3.2, side)), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if not written:
        # A cell would be smaller than a pixel; the areas of dots show the counts.
        rows, columns = np.nonzero(mistakes)
        counts = mistakes[rows, columns]
        axes.scatter(
            columns, rows, s=60 * counts / max(1, mistakes.max()), color=LIGHT["wrong"], alpha=0.5, linewidths=0
        )
        axes.set(xlim=(-0.5, num_classes - 0.5), ylim=(num_classes - 0.5, -0.5), aspect="equal")
        axes.set_title(f"Mistakes among {num_classes:,} classes, by class index")
        return figure
    colours = LinearSegmentedColormap.from_list("mistakes", [LIGHT["paper"], LIGHT["wrong"]])
    # Colours use 60 % of the range, so that dark digits are readable on the strongest cell.
    axes.imshow(mistakes, cmap=colours, vmin=0, vmax=max(1, mistakes.max()) / 0.6)
    names = [shorten(name, 16) for name in classes]
    axes.set_xticks(range(num_classes), names, rotation=0 if max(len(name) for name in names) <= 3 else 90)
    axes.set_yticks(range(num_classes), names)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        colour = LIGHT["muted"] if row == column else LIGHT["ink"]
        text = axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", size=8, color=colour)
        text.set_in_layout(False)  # measuring each takes longer than drawing
    return figure


def draw_mistakes(mistakes: list[ReportedMistake]) -> Figure:
    """Returns the mistakes as tiles, all on one set of axes: two dozen axes take a second to draw."""
    num_rows = max(1, -(-len(mistakes) // _TILES_PER_ROW))
    figure = Figure(figsize=(9.2, 1.62 * num_rows), layout="constrained")
    axes = figure.subplots()
    for number, mistake in enumerate(mistakes):
        row, column = divmod(number, _TILES_PER_ROW)
        x, y = column * 1.15, row * 1.62
        axes.imshow(mistake.pixels, cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y + 1, y), interpolation="nearest")
        predicted = f"{shorten(mistake.predicted, 8)}: {percent(mistake.confidence, 0)}"
        label = f"{shorten(mistake.label, 8)}: {percent(mistake.label_probability, 0)}"
        axes.text(x, y + 1.05, f"✗ {predicted}", va="top", size=7.5, color=LIGHT["wrong"])
        axes.text(x, y + 1.25, f"✓ {label}", va="top", size=7.5, color=LIGHT["train"])
    if not mistakes:
        axes.text(_TILES_PER_ROW * 0.575, 0.8, "no mistakes", ha="center", va="center", color=LIGHT["muted"])
    axes.set(xlim=(0, _TILES_PER_ROW * 1.15), ylim=(num_rows * 1.62, 0))
    axes.set_axis_off()
    return figure


def percent(share: float, num_decimals: int = 2) -> str:
    """Returns a share of 1 as `91.90 %`, never rounded to 100 or 0 %."""
    shown = f"{100 * share:.{num_decimals}f}"
    smallest = 10.0**-num_decimals
    if float(shown) == 100 and share < 1 - 1e-9:
        shown = f"{100 - smallest:.{num_decimals}f}"
    elif float(shown) == 0 and share > 1e-9:
        shown = f"<{smallest:.{num_decimals}f}"
    return f"{shown} %"


def shorten(name: str, length: int) -> str:
    """Returns a long name cut in its middle, because similar names often differ at the end."""
    end = length // 3
    return name if len(name) <= length else f"{name[: length - 1 - end]}…{name[-end:]}"


def _draw_loss(axes: Axes, curves: Curves) -> None:
    axes.set_title("Loss")
    _draw_lines(axes, curves, "loss", lambda values: values)
    if _is_wide([line[key] for line in curves.epochs for key in ("train_loss", "val_loss") if key in line]):
        axes.set_yscale("log")
        _number_log_axis(axes, lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)  # leaves room for the mark of the first epoch
    axes.legend()


def _draw_accuracy(axes: Axes, curves: Curves) -> None:
    errors = [1 - line[key] for line in curves.epochs for key in ("train_accuracy", "val_accuracy") if key in line]
    if _is_wide(errors):
        # From 98 to 99 % is as far as from 80 to 90 %: both halve the errors.
        axes.set_title("Accuracy, %, on a log scale of errors")
        _draw_lines(axes, curves, "accuracy", lambda values: np.maximum(1 - values, min(errors) / 2))
        axes.set_yscale("log")
        axes.invert_yaxis()
        _number_log_axis(axes, lambda value, _: f"{100 * (1 - value):g}")
    else:
        axes.set_title("Accuracy, %")
        _draw_lines(axes, curves, "accuracy", lambda values: 100 * values)


def _draw_lines(axes: Axes, curves: Curves, key: str, scale: Callable[[Numbers], Numbers]) -> None:
    """Draws training by step and by epoch, and validation by epoch."""
    ends = _column(curves.epochs, "epoch")
    marked = len(ends) <= _MAX_MARKED_EPOCHS
    if len(curves.steps) > 1:
        x, y = _column(curves.steps, "step") / curves.steps_per_epoch, scale(_column(curves.steps, key))
        axes.plot(x, y, color=LIGHT["train"], alpha=0.25, linewidth=0.8)
        axes.plot(x, _smooth(y), color=LIGHT["train"], alpha=0.6, linewidth=1, label="training, by step")
    # The mean over an epoch is drawn at its middle; validation has the weights of its end.
    train = scale(_column(curves.epochs, f"train_{key}"))
    marks = ("o", "s") if marked else ("", "")
    axes.plot(ends - 0.5, train, color=LIGHT["train"], marker=marks[0], label="training, mean of epoch")
    if f"val_{key}" in curves.epochs[0]:
        validation = scale(_column(curves.epochs, f"val_{key}"))
        axes.plot(ends, validation, color=LIGHT["wrong"], marker=marks[1], label="validation", clip_on=False)


def _draw_lr_factor(axes: Axes, curves: Curves) -> None:
    axes.set_title("Learning rate, relative to the recipe's", size=8.5, weight="normal")
    x = np.arange(1, len(curves.lr_factors) + 1) / curves.steps_per_epoch
    axes.plot(x, curves.lr_factors, color=LIGHT["muted"], linewidth=1.2)
    top = max(curves.lr_factors) or 1.0
    axes.set_ylim(0, top * 1.15)
    axes.set_yticks([0, top], ["0", f"{top:.3g}"])


def _draw_throughput(axes: Axes, curves: Curves) -> None:
    axes.set_title("Images/s", size=8.5, weight="normal")
    ends = np.concatenate([[0], _column(curves.epochs, "epoch")])  # a full disk may have lost some
    seconds = np.diff(_column(curves.epochs, "seconds"), prepend=0)
    rates = curves.images_per_epoch * np.diff(ends) / np.maximum(seconds, 1e-9)
    axes.stairs(rates, ends, baseline=None, color=LIGHT["muted"], linewidth=1.2)
    axes.set_ylim(0, rates.max() * 1.15)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _number_log_axis(axes: Axes, write: Callable[[float, int], str]) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(write))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _is_wide(values: list[float]) -> bool:
    """Returns whether a logarithmic axis is possible and shows more."""
    return min(values) > 0 and max(values) / min(values) >= 5


def _column(lines: list[dict[str, Any]], key: str) -> Numbers:
    return np.array([line[key] for line in lines], dtype=np.float64)


def _smooth(values: Numbers) -> Numbers:
    """Returns the centred running mean over a 40th of the run, over less at the ends."""
    window = np.ones(max(1, len(values) // 40))
    result: Numbers = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    return result
