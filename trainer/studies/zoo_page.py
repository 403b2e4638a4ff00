"""The page of the zoo study: its findings and tables, with the figures of `zoo_figures`."""

import statistics
from functools import partial

from trainer.studies.page import CaptionedFigure, Column, Page, Table
from trainer.studies.zoo_figures import RUNTIME_NAMES, ZooEntry, draw_accuracy, draw_times, label


def make_page(
    originals: list[ZooEntry], small: list[ZooEntry], num_evaluations: int, times: dict[str, float], runtimes: list[str]
) -> Page:
    """Returns the page.

    Args:
        originals: torchvision's networks.
        small: our networks for small images.
        num_evaluations: on CIFAR-10's test images, in the ledger of this folder of runs.
        times: milliseconds per image, by "original|small NAME RUNTIME BATCH".
        runtimes: the measured runtimes.
    """
    trained = [entry for entry in small if entry.accuracy is not None]
    return Page(
        title="The zoo: the cost of accuracy",
        findings=_findings(originals, trained, num_evaluations, times),
        figures=_figures(originals, trained, times, runtimes),
        tables=[
            _costs_table("imagenet", "ImageNet-size networks", "top-1, %", originals),
            _costs_table("small", "Our networks for 32x32 images", "CIFAR-10 test, %", small),
            _times_table(times, runtimes),
        ],
        result={
            "imagenet": {entry.name: _to_json(entry) for entry in originals},
            "small": {entry.name: _to_json(entry) for entry in small},
            "milliseconds_an_image": times,
        },
    )


def _to_json(entry: ZooEntry) -> dict[str, float | int | str | None]:
    return {
        "accuracy": entry.accuracy,
        "num_runs": entry.num_runs,
        "epochs": entry.epochs,
        "num_parameters": entry.cost.num_parameters,
        "multiply_adds": entry.cost.multiply_adds,
    }


def _figures(
    originals: list[ZooEntry], trained: list[ZooEntry], times: dict[str, float], runtimes: list[str]
) -> list[CaptionedFigure]:
    figures = [
        CaptionedFigure(
            name="accuracy-by-cost",
            title="ImageNet: accuracy by multiply-adds",
            caption="Top-1 accuracy that torchvision publishes for its first weights (one crop), by the multiply-adds "
            "of one image; the area is the number of parameters.",
            draw=partial(draw_accuracy, originals, "Top-1 accuracy on ImageNet, %", 1e9, "multiply-adds, billions"),
        )
    ]
    if trained:
        figures.append(
            CaptionedFigure(
                name="small-accuracy-by-cost",
                title="CIFAR-10: our networks for small images",
                caption="Median test accuracy of our own runs in this workspace, by the multiply-adds of one 32x32 "
                "image; the area is the number of parameters.",
                draw=partial(draw_accuracy, trained, "Test accuracy on CIFAR-10, %", 1e6, "multiply-adds, millions"),
            )
        )
    for kind, networks in (("original", "ImageNet-size networks"), ("small", "Our networks, 32x32 images")):
        if any(key.startswith(f"{kind} ") for key in times):
            figures.append(
                CaptionedFigure(
                    name=f"{kind}-times",
                    title=f"{networks}: time per image by batch size",
                    caption="Milliseconds per image in a forward pass on this machine, by images in the pass, on "
                    "logarithmic axes, a panel for each runtime. Batch sizes that would take too long are left out.",
                    draw=partial(draw_times, kind, times, runtimes),
                )
            )
    return figures


def _findings(
    originals: list[ZooEntry], trained: list[ZooEntry], num_evaluations: int, times: dict[str, float]
) -> list[str]:
    by_name = {entry.name: entry for entry in originals}
    vgg, resnet = by_name["vgg19"], by_name["resnet50"]
    assert vgg.accuracy is not None
    assert resnet.accuracy is not None
    found = [
        f"ResNet-50 is {100 * (resnet.accuracy - vgg.accuracy):.1f} points better than VGG-19, with "
        f"{vgg.cost.multiply_adds / resnet.cost.multiply_adds:.1f} times fewer multiply-adds and "
        f"{vgg.cost.num_parameters / resnet.cost.num_parameters:.1f} times fewer parameters.",
        "torchvision publishes no weights of the BN-NIN and BN-AlexNet in the lecture's figure; their small-image "
        "forms are among ours.",
    ]
    ratios = [
        times[other] / times[key]
        for key in times
        if " eager " in key and (other := key.replace(" eager ", " onnxruntime ")) in times
    ]
    if ratios:
        found.append(
            f"ONNX Runtime takes {min(ratios):.2f} to {max(ratios):.2f} times as long as PyTorch's eager mode here, "
            f"with a median of {statistics.median(ratios):.2f}."
        )
    if trained:
        found.append(
            "Accuracies on CIFAR-10 are medians of all finished runs in this folder of runs, whatever their settings, "
            f"without intervals; its ledger holds {num_evaluations} evaluation{'s' if num_evaluations != 1 else ''} on "
            "those test images. A network whose runs had fewer epochs than its recipe can do better than shown."
        )
    else:
        found.append(
            "No finished run of ours on CIFAR-10 was found: train some (--recipe cifar10-lenet5, …), and run this "
            "study again."
        )
    return found


def _costs_table(name: str, title: str, accuracy: str, entries: list[ZooEntry]) -> Table:
    return Table(
        name=name,
        title=title,
        columns=(
            Column("network"),
            Column(accuracy, 2),
            Column("parameters, millions", 2),
            Column("multiply-adds, millions", 1),
            Column("our runs"),
            Column("epochs"),
        ),
        rows=[
            (
                label(entry.name),
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
        title="Milliseconds per image",
        columns=(
            Column("network"),
            Column("images per pass"),
            *(Column(RUNTIME_NAMES[runtime], 3) for runtime in runtimes),
        ),
        rows=[
            (
                label(name) + ("" if kind == "original" else " (32x32)"),
                batch,
                *(times.get(f"{kind} {name} {runtime} {batch}") for runtime in runtimes),
            )
            for kind, name, batch in keys
        ],
    )
