"""The zoo study's figures, tables and findings."""

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from trainer.models.cost import Cost
from trainer.studies.page import Page, Picture, Table

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
"""One a network, the same in all panels; dark enough for lines on white, light enough on black. The networks after the
tenth have them again, with dashed lines."""
_NAMES = {
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
_PLACES = {
    "googlenet": "left",
    "bn-nin": "left",
    "resnet18": "right",
    "resnet34": "right",
    "resnet50": "above",
    "inception_v3": "above",
    "vgg16": "above",
}
"""Of names in the bubble charts, so that neighbours' do not run into each other; below by default."""
_RUNTIMES = {"eager": "PyTorch, eager", "torchscript": "TorchScript, frozen", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooEntry:
    """A network and what it costs.

    Args:
        accuracy: top-1, 0 to 1, or None.
        num_runs: of ours, that it is the median of, each a look at the test set.
        epochs: of those runs, in words.
    """

    name: str
    cost: Cost
    accuracy: float | None
    num_runs: int = 0
    epochs: str | None = None


def make_page(
    originals: list[ZooEntry], small: list[ZooEntry], num_looks: int, times: dict[str, float], runtimes: list[str]
) -> Page:
    """Everything that the study says.

    Args:
        num_looks: at CIFAR-10's test images, in the ledger of this folder of runs.
        times: milliseconds an image, by "original|small NAME RUNTIME BATCH".
    """
    trained = [entry for entry in small if entry.accuracy is not None]
    pictures = [
        Picture(
            name="accuracy-by-cost",
            title="ImageNet: accuracy against multiply-adds",
            text="Top-1 accuracy that torchvision publishes for its first weights (one crop), against the "
            "multiply-adds of one image; the area is the number of parameters.",
            figure=_draw_accuracy(originals, "top-1 accuracy on ImageNet, %", 1e9, "multiply-adds, billions"),
        )
    ]
    if trained:
        pictures.append(
            Picture(
                name="small-accuracy-by-cost",
                title="CIFAR-10: our networks for small images",
                text="Median test accuracy of our own runs in this workspace, against the multiply-adds of one 32x32 "
                "image; the area is the number of parameters.",
                figure=_draw_accuracy(trained, "test accuracy on CIFAR-10, %", 1e6, "multiply-adds, millions"),
            )
        )
    for kind, what in (("original", "ImageNet-size networks"), ("small", "Our networks, 32x32 images")):
        if any(key.startswith(f"{kind} ") for key in times):
            pictures.append(
                Picture(
                    name=f"{kind}-times",
                    title=f"{what}: time an image by batch size",
                    text="Milliseconds an image in a forward pass on this machine, by images in the pass, both axes "
                    "logarithmic, one panel for each runtime. Points that would take too long are left out.",
                    figure=_draw_times(kind, times, runtimes),
                )
            )
    return Page(
        title="The zoo: what accuracy costs",
        findings=_findings(originals, trained, num_looks, times),
        pictures=pictures,
        tables=[
            _costs("imagenet", "ImageNet-size networks", "top-1, %", originals),
            _costs("small", "Our networks for 32x32 images", "CIFAR-10 test, %", small),
            _times_table(times, runtimes),
        ],
        result={
            "imagenet": {entry.name: _values(entry) for entry in originals},
            "small": {entry.name: _values(entry) for entry in small},
            "milliseconds_an_image": times,
        },
    )


def _values(entry: ZooEntry) -> dict[str, float | int | str | None]:
    return {
        "accuracy": entry.accuracy,
        "num_runs": entry.num_runs,
        "epochs": entry.epochs,
        "num_parameters": entry.cost.num_parameters,
        "multiply_adds": entry.cost.multiply_adds,
    }


def _findings(originals: list[ZooEntry], trained: list[ZooEntry], num_looks: int, times: dict[str, float]) -> list[str]:
    by_name = {entry.name: entry for entry in originals}
    vgg, resnet = by_name["vgg19"], by_name["resnet50"]
    assert vgg.accuracy is not None
    assert resnet.accuracy is not None
    found = [
        f"ResNet-50 is {100 * (resnet.accuracy - vgg.accuracy):.1f} points better than VGG-19 with "
        f"{vgg.cost.multiply_adds / resnet.cost.multiply_adds:.1f} times fewer multiply-adds and "
        f"{vgg.cost.num_parameters / resnet.cost.num_parameters:.1f} times fewer parameters.",
        "BN-NIN and BN-AlexNet of the lecture's figure have no published weights in torchvision; their small-image "
        "forms are among ours.",
    ]
    faster = [
        (times[key] / times[other], key)
        for key in times
        if " eager " in key and (other := key.replace(" eager ", " onnxruntime ")) in times
    ]
    if faster:
        ratios = sorted(ratio for ratio, _ in faster)
        found.append(
            f"ONNX Runtime takes {1 / ratios[-1]:.2f} to {1 / ratios[0]:.2f} times the time of PyTorch's eager mode "
            f"here, in the middle {1 / ratios[len(ratios) // 2]:.2f} times."
        )
    if trained:
        found.append(
            "Accuracies on CIFAR-10 are medians of all finished runs in this folder of runs, whatever their settings, "
            f"without intervals; its ledger holds {num_looks} look{'s' if num_looks != 1 else ''} at those images. "
            "A network whose runs had fewer epochs than its recipe is shown below what it can do."
        )
    else:
        found.append(
            "No finished run of ours on CIFAR-10 was found: train some (--recipe cifar10-lenet5, …), and ask again."
        )
    return found


def _label(name: str) -> str:
    return _NAMES.get(name, name.replace("resnet", "ResNet-"))


def _draw_accuracy(entries: list[ZooEntry], what: str, unit: float, x_label: str) -> Figure:
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots()
    largest = max(entry.cost.num_parameters for entry in entries)
    for number, entry in enumerate(entries):
        assert entry.accuracy is not None
        x, y = entry.cost.multiply_adds / unit, 100 * entry.accuracy
        area = 1500 * entry.cost.num_parameters / largest
        axes.scatter([x], [y], s=area, color=_COLOURS[number % len(_COLOURS)], alpha=0.5, linewidths=0)
        axes.annotate(
            _label(entry.name),
            (x, y),
            size=8.5,
            **_place(entry.name, area**0.5 / 2 + 3),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{x_label} (logarithmic); area: parameters, largest {largest / 1e6:.3g} million")
    axes.set_title(what[0].upper() + what[1:])
    axes.margins(x=0.12, y=0.16)
    axes.grid(axis="both")
    axes.tick_params(which="both", length=0)
    return figure


def _place(name: str, away: float) -> dict[str, Any]:
    """Where a bubble's name is written, so many points from its centre."""
    places: dict[str, dict[str, Any]] = {
        "left": {"xytext": (-away, 0), "ha": "right", "va": "center"},
        "right": {"xytext": (away, 0), "ha": "left", "va": "center"},
        "above": {"xytext": (0, away), "ha": "center", "va": "bottom"},
        "below": {"xytext": (0, -away), "ha": "center", "va": "top"},
    }
    return {"textcoords": "offset points", **places[_PLACES.get(name, "below")]}


def _draw_times(kind: str, times: dict[str, float], runtimes: list[str]) -> Figure:
    parts = [key.split() for key in times if key.startswith(f"{kind} ")]
    names = list(dict.fromkeys(name for _, name, _, _ in parts))
    batches = sorted({int(batch) for *_, batch in parts})
    figure = Figure(figsize=(3.6 * len(runtimes) + 1.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(runtimes), sharey=True, squeeze=False)[0]
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
                label=_label(name),
            )
        _finish_times(axes, batches, _RUNTIMES[runtime])
    panels[0].set_ylabel("milliseconds an image")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _finish_times(axes: Axes, batches: list[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("images a pass")
    axes.set_title(title)
    axes.grid(axis="y")
    axes.tick_params(which="both", length=0)


def _costs(name: str, title: str, accuracy: str, entries: list[ZooEntry]) -> Table:
    return Table(
        name=name,
        title=title,
        header=(
            "network",
            accuracy,
            "parameters, millions",
            "multiply-adds, millions",
            "runs of ours, a look each",
            "epochs",
        ),
        rows=[
            (
                _label(entry.name),
                None if entry.accuracy is None else 100 * entry.accuracy,
                entry.cost.num_parameters / 1e6,
                entry.cost.multiply_adds / 1e6,
                entry.num_runs or None,
                entry.epochs,
            )
            for entry in entries
        ],
    )


def _times_table(times: dict[str, float], runtimes: list[str]) -> Table:
    keys = dict.fromkeys((kind, name, int(batch)) for kind, name, _, batch in (key.split() for key in times))
    return Table(
        name="times",
        title="Milliseconds an image",
        header=("network", "images a pass", *(_RUNTIMES[runtime] for runtime in runtimes)),
        rows=[
            (
                _label(name) + ("" if kind == "original" else " (32x32)"),
                batch,
                *(times.get(f"{kind} {name} {runtime} {batch}") for runtime in runtimes),
            )
            for kind, name, batch in keys
        ],
    )
