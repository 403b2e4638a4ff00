"""The figures of the zoo study: accuracy by cost, and time per image by batch size."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from trainer.models.cost import Cost
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
_LABEL_SIDES = {
    "googlenet": "left",
    "bn-nin": "left",
    "resnet18": "right",
    "resnet34": "right",
    "resnet50": "above",
    "inception_v3": "above",
    "vgg16": "above",
}
"""On which side of its bubble a network's label stands, so that labels do not overlap; below by default."""
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
    """Returns a network's name as people write it."""
    return _LABELS.get(name, name.replace("resnet", "ResNet-"))


def draw_accuracy(entries: list[ZooEntry], title: str, unit: float, x_label: str, *, narrow: bool) -> Figure:
    """Draws accuracy by multiply-adds, with a bubble for each network whose area is its number of parameters.

    Args:
        entries: with accuracies.
        unit: multiply-adds in one unit of the x axis.
    """
    figure = new_figure(8.4, 4.8, narrow=narrow, narrow_height=4.4)
    axes = figure.subplots()
    largest = max(entry.cost.num_parameters for entry in entries)
    for number, entry in enumerate(entries):
        assert entry.accuracy is not None
        x, y = entry.cost.multiply_adds / unit, 100 * entry.accuracy
        area = (500 if narrow else 1500) * entry.cost.num_parameters / largest
        axes.scatter([x], [y], s=area, color=_COLOURS[number % len(_COLOURS)], alpha=0.5, linewidths=0)
        axes.annotate(label(entry.name), (x, y), size=8.5, **_label_position(entry.name, area**0.5 / 2 + 3))
    use_log_scale(axes, "x")
    separator = "\n" if narrow else "; "
    axes.set_xlabel(f"{x_label} (logarithmic){separator}area: parameters, largest {largest / 1e6:.3g} million")
    axes.set_title(title)
    axes.margins(x=0.12, y=0.16)
    finish_axes(axes, grid="both")
    return figure


def _label_position(name: str, distance: float) -> dict[str, Any]:
    """Returns the arguments of `annotate` that put a label at this distance, in points, from its bubble's centre."""
    positions: dict[str, dict[str, Any]] = {
        "left": {"xytext": (-distance, 0), "ha": "right", "va": "center"},
        "right": {"xytext": (distance, 0), "ha": "left", "va": "center"},
        "above": {"xytext": (0, distance), "ha": "center", "va": "bottom"},
        "below": {"xytext": (0, -distance), "ha": "center", "va": "top"},
    }
    return {"textcoords": "offset points", **positions[_LABEL_SIDES.get(name, "below")]}


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
        finish_axes(axes)
    figure.supxlabel("images per pass", size="medium")
    figure.supylabel("milliseconds per image", size="medium")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if narrow:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    else:
        figure.legend(handles, labels, loc="outside right center")
    return figure
