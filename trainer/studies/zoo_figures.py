"""The figures of the zoo study: accuracy by cost, and time per image by batch size."""

import itertools
import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase

from trainer.models.cost import Cost
from trainer.report.figures import LIGHT
from trainer.studies.plots import finish_axes, new_figure, use_log_scale

_COLOURS = (
    "#1668a8",
    "#b34e0a",
    "#4f7d2c",
    "#8a4fa3",
    "#b08900",
    "#3a8f8f",
    "#a33b52",
    "#6b6f75",
    "#2f4b8f",
    "#7a5230",
)
"""A colour for each network, the same in all panels: dark enough for lines on white, light enough for lines on black.
From the eleventh network on the colours repeat, with dashed lines."""
_LABELS = {
    "alexnet": "AlexNet",
    "bn-alexnet": "BN-AlexNet",
    "bn-nin": "BN-NIN",
    "vgg16": "VGG-16",
    "vgg19": "VGG-19",
    "googlenet": "GoogLeNet",
    "inception_v3": "Inception-v3",
    "lenet5": "LeNet-5",
    "lecture": "lecture's",
    "cifar10-small": "airbench, small",
    "cifar10": "airbench",
}
_DISTANCES = (3, 14, 26, 40, 55, 70)
"""Distances of a label from its bubble, in points, in the order in which they are tried."""
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
RUNTIME_NAMES = {"eager": "PyTorch, eager", "torchscript": "TorchScript, frozen", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooEntry:
    """A network and its cost.

    Args:
        accuracy: top-1, 0 to 1; None if unknown.
        num_runs: number of our runs, each evaluated on the test set once; their median is `accuracy`.
        epochs: the epochs of those runs, as text.
    """

    name: str
    cost: Cost
    accuracy: float | None
    num_runs: int = 0
    epochs: str | None = None


def label(name: str) -> str:
    """Returns a network's usual name, such as ResNet-18."""
    return _LABELS.get(name, name.replace("resnet", "ResNet-"))


def draw_accuracy(entries: list[ZooEntry], title: str, unit: float, x_label: str, *, narrow: bool) -> Figure:
    """Draws accuracy by multiply-adds, with a bubble for each network whose area is its number of parameters.

    Args:
        entries: with accuracies.
        unit: multiply-adds in one unit of the x axis.
    """
    figure = new_figure(8.4, 4.8, narrow=narrow, narrow_height=4.6)
    axes = figure.subplots()
    largest = max(entry.cost.num_parameters for entry in entries)
    bubbles = []
    for number, entry in enumerate(entries):
        assert entry.accuracy is not None
        x, y = entry.cost.multiply_adds / unit, 100 * entry.accuracy
        area, colour = (500 if narrow else 1500) * entry.cost.num_parameters / largest, _COLOURS[number % len(_COLOURS)]
        axes.scatter([x], [y], s=area, color=colour, alpha=0.5, linewidths=0)
        axes.scatter([x], [y], s=5, color=colour, linewidths=0)  # small networks have no visible area
        bubbles.append(_Bubble(x, y, (area / math.pi) ** 0.5, label(entry.name)))
    axes.margins(x=0.12, y=0.16)
    use_log_scale(axes, "x")
    separator = "\n" if narrow else "; "
    axes.set_xlabel(f"{x_label} (logarithmic){separator}area: parameters, largest {largest / 1e6:.3g} million")
    axes.set_title(title)
    finish_axes(axes, grid="both")
    _add_labels(axes, bubbles)
    return figure


@dataclass(frozen=True, slots=True)
class _Bubble:
    """A bubble in data coordinates, its radius in points, and its label."""

    x: float
    y: float
    radius: float
    text: str


def _add_labels(axes: Axes, bubbles: list[_Bubble]) -> None:
    """Labels bubbles, as close as possible without covering a label or the middle of a bubble."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # computes the layout, and with it the positions in pixels
    pixels = figure.dpi / 72
    taken = []
    for bubble in bubbles:
        x, y = axes.transData.transform((bubble.x, bubble.y))
        half = max(3.0, 0.7 * bubble.radius) * pixels
        taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    for bubble in bubbles:
        for distance, (dx, dy) in itertools.product(_DISTANCES, _DIRECTIONS):
            offset = (dx * (bubble.radius + distance), dy * (bubble.radius + distance))
            text = _annotate(axes, bubble, offset)
            extent = text.get_window_extent()
            if not any(extent.overlaps(other) for other in taken) and _contains(axes.bbox, extent):
                break
            text.remove()
        else:
            text = _annotate(axes, bubble, (bubble.radius + _DISTANCES[0], 0))
            extent, distance = text.get_window_extent(), _DISTANCES[0]
        taken.append(extent)
        if distance != _DISTANCES[0]:
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": LIGHT["muted"], "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (bubble.x, bubble.y), offset, textcoords="offset points", arrowprops=line)


def _annotate(axes: Axes, bubble: _Bubble, offset: tuple[float, float]) -> Annotation:
    """Adds a label at an offset in points, aligned with the side that faces the bubble."""
    alignments = (("right", "center", "left"), ("top", "center", "bottom"))
    horizontal, vertical = (
        names[1 + (value > 0) - (value < 0)] for names, value in zip(alignments, offset, strict=True)
    )
    text = axes.annotate(
        bubble.text, (bubble.x, bubble.y), offset, textcoords="offset points", size=8.5, ha=horizontal, va=vertical
    )
    text.set_in_layout(False)  # or the layout would move the axes
    return text


def _contains(outer: BboxBase, inner: BboxBase) -> bool:
    return bool(outer.contains(inner.x0, inner.y0) and outer.contains(inner.x1, inner.y1))


def draw_times(kind: str, times: dict[str, float], runtimes: list[str], *, narrow: bool) -> Figure:
    """Draws milliseconds per image by batch size, a panel for each runtime.

    Args:
        kind: `original` or `small`.
        times: by "KIND NAME RUNTIME BATCH".
    """
    parts = [key.split() for key in times if key.startswith(f"{kind} ")]
    names = list(dict.fromkeys(name for _, name, _, _ in parts))
    batches = sorted({int(batch) for *_, batch in parts})
    legend_height = 0.2 * -(-len(names) // 2)
    figure = new_figure(3.6 * len(runtimes) + 1.4, 4.2, narrow=narrow, narrow_height=3 * len(runtimes) + legend_height)
    shape = (len(runtimes), 1) if narrow else (1, len(runtimes))
    panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).flat
    for runtime, axes in zip(runtimes, panels, strict=True):
        for number, name in enumerate(names):
            measured = [b for b in batches if f"{kind} {name} {runtime} {b}" in times]
            axes.plot(
                measured,
                [times[f"{kind} {name} {runtime} {b}"] for b in measured],
                color=_COLOURS[number % len(_COLOURS)],
                marker="o",
                markersize=3,
                linewidth=1.3,
                linestyle="-" if number < len(_COLOURS) else (0, (3, 2)),
                label=label(name),
            )
        use_log_scale(axes, "x", ticks=[float(batch) for batch in batches])
        use_log_scale(axes, "y")
        axes.set_title(RUNTIME_NAMES[runtime])
        axes.set(xlabel="images per pass", ylabel="milliseconds per image")
        axes.label_outer()
        finish_axes(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if narrow:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    else:
        figure.legend(handles, labels, loc="outside right center")
    return figure
