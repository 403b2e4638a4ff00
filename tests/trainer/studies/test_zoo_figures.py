"""Tests of the zoo study's figures: labels of crowded bubbles, and panels for screens and phones."""

import pytest

from trainer.models.cost import Cost
from trainer.report.figures import style
from trainer.studies.zoo_figures import ZooEntry, draw_accuracy, draw_times

# Multiply-adds in millions, parameters in millions, accuracy in percent: six networks close together, two far away.
NETWORKS = {
    "lenet5": (0.65, 0.06, 70.4),
    "lecture": (3.2, 0.11, 60.0),
    "resnet18": (555, 11.2, 93.0),
    "resnet34": (1159, 21.3, 93.5),
    "resnet50": (1298, 23.5, 94.0),
    "googlenet": (1447, 5.9, 92.0),
    "resnet101": (2510, 42.5, 94.1),
    "resnet152": (3722, 58.2, 94.2),
}


@pytest.mark.parametrize("narrow", [False, True])
def test_labels_of_crowded_networks_do_not_overlap(narrow: bool) -> None:
    entries = [
        ZooEntry(
            name=name,
            cost=Cost(num_parameters=round(parameters * 1e6), multiply_adds=round(operations * 1e6)),
            accuracy=percent / 100,
        )
        for name, (operations, parameters, percent) in NETWORKS.items()
    ]
    with style():
        figure = draw_accuracy(entries, "accuracy", 1e6, "multiply-adds", narrow=narrow)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(labels) == len(NETWORKS)
    for number, extent in enumerate(labels):
        assert not any(extent.overlaps(other) for other in labels[number + 1 :])
        assert axes.bbox.contains(extent.x0, extent.y0)
        assert axes.bbox.contains(extent.x1, extent.y1)


@pytest.mark.parametrize(("narrow", "num_rows"), [(False, 1), (True, 3)])
def test_the_panels_of_the_narrow_figure_are_stacked(narrow: bool, num_rows: int) -> None:
    runtimes = ["eager", "torchscript", "onnxruntime"]
    times = {f"small lenet5 {runtime} {batch}": 0.1 * batch for runtime in runtimes for batch in (1, 2)}
    with style():
        figure = draw_times("small", times, runtimes, narrow=narrow)
        figure.draw_without_rendering()
    assert len({axes.get_position().y0 for axes in figure.axes}) == num_rows
