"""The chain rule on a graph of operators (page 17 of the lecture): by hand, by autograd and by small differences."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from matplotlib.figure import Figure

from convoy.options import option
from trainer.data.order import generator
from trainer.ranks.world import World
from trainer.report.figures import LIGHT
from trainer.studies.folder import StudyFolder
from trainer.studies.page import CaptionedFigure, Cell, Column, Page, Table, write_page
from trainer.studies.plots import new_figure

_STEP = 1e-6
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainRuleConfig:
    """Computes the gradients of a network of two layers by the chain rule, and compares them with autograd's."""

    seed: int = 0
    """Seed of the input, the target and the weights."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-chain-rule-TIME")] = None
    """Folder of this study."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A node of the graph: computes a tensor from others, and passes the gradient of the loss back to them.

    Args:
        output: the name of what it computes.
        inputs: the names of what it computes it from.
        forward: the value from the inputs.
        backward: the gradients by the inputs, from the gradient by the output, the output and the inputs.
    """

    name: str
    output: str
    inputs: tuple[str, ...]
    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, ...]]


GRAPH = (
    Operator("W1 x", "a", ("W1", "x"), torch.matmul, lambda g, _, w, x: (torch.outer(g, x), w.T @ g)),
    Operator("tanh", "h", ("a",), torch.tanh, lambda g, h, _: (g * (1 - h**2),)),
    Operator("W2 h", "y", ("W2", "h"), torch.matmul, lambda g, _, w, h: (torch.outer(g, h), w.T @ g)),
    Operator(
        "mean (y - t)²",
        "loss",
        ("y", "t"),
        lambda y, t: (y - t).square().mean(),
        lambda g, _, y, t: (g * 2 * (y - t) / len(y), -g * 2 * (y - t) / len(y)),
    ),
)
LEAVES = {"x": (3,), "W1": (4, 3), "W2": (2, 4), "t": (2,)}


def study_chain_rule(config: ChainRuleConfig) -> None:
    """Runs `python -m trainer study chain-rule`."""
    with World.join("cpu") as world, StudyFolder.open("chain-rule", config, world) as folder:
        if world.is_main:
            write_page(folder, make_page(make_leaves(config.seed)))


def make_leaves(seed: int) -> Tensors:
    """Returns the tensors that the graph begins with, float64."""
    stream = generator("chain-rule", seed)
    return {name: torch.randn(shape, dtype=torch.float64, generator=stream) for name, shape in LEAVES.items()}


def run_forward(leaves: Tensors) -> Tensors:
    """Returns the values of all nodes, in the order of the graph."""
    values = dict(leaves)
    for operator in GRAPH:
        values[operator.output] = operator.forward(*(values[name] for name in operator.inputs))
    return values


def run_backward(values: Tensors) -> Tensors:
    """Returns the gradients of the loss by all nodes: the graph backwards, adding up what comes by several ways."""
    gradients = {"loss": torch.ones((), dtype=torch.float64)}
    for operator in reversed(GRAPH):
        inputs = [values[name] for name in operator.inputs]
        parts = operator.backward(gradients[operator.output], values[operator.output], *inputs)
        for name, part in zip(operator.inputs, parts, strict=True):
            gradients[name] = gradients[name] + part if name in gradients else part
    return gradients


def by_autograd(leaves: Tensors) -> Tensors:
    """Returns torch's gradients of the loss by the leaves."""
    tracked = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    found = torch.autograd.grad(run_forward(tracked)["loss"], list(tracked.values()))
    return dict(zip(tracked, found, strict=True))


def by_differences(leaves: Tensors) -> Tensors:
    """Returns the gradients by moving each number a little to both sides."""
    found = {}
    for name, value in leaves.items():
        gradient = torch.zeros_like(value)
        for position in range(value.numel()):
            ends = []
            for step in (_STEP, -_STEP):
                moved = value.clone()
                moved.view(-1)[position] += step
                ends.append(float(run_forward(leaves | {name: moved})["loss"]))
            gradient.view(-1)[position] = (ends[0] - ends[1]) / (2 * _STEP)
        found[name] = gradient
    return found


def make_page(leaves: Tensors) -> Page:
    """Returns the page."""
    values = run_forward(leaves)
    gradients, autograd, differences = run_backward(values), by_autograd(leaves), by_differences(leaves)
    gap = max(float((gradients[name] - autograd[name]).abs().max()) for name in leaves)
    coarse = max(float((gradients[name] - differences[name]).abs().max()) for name in leaves)
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            "x".join(map(str, value.shape)),
            float(gradients[name].norm()),
            float(autograd[name].norm()),
            float(differences[name].norm()),
        )
        for name, value in leaves.items()
    ]
    return Page(
        title="The chain rule on a graph of operators",
        findings=[
            f"The chain rule by hand agrees with autograd to {gap:.1g}, and with differences to {coarse:.1g}.",
            "Each operator knows its own derivative alone. The graph is run backwards, and each one multiplies what "
            "comes from behind it.",
        ],
        figures=[
            CaptionedFigure(
                name="graph",
                title="The graph",
                caption="Forward to the right: values. Backward to the left: the norm of the gradient of the loss.",
                draw=partial(_draw_graph, values, gradients),
            )
        ],
        tables=[
            Table(
                name="gradients",
                title="Norms of the gradients",
                columns=(
                    Column("by"),
                    Column("shape"),
                    Column("chain rule", 6),
                    Column("autograd", 6),
                    Column("differences", 6),
                ),
                rows=rows,
            )
        ],
        result={"largest_difference_from_autograd": gap, "largest_difference_from_differences": coarse},
    )


_PLACES = {"x": (0, 1), "W1": (0, 2), "a": (1, 1), "h": (2, 1), "W2": (2, 2), "y": (3, 1), "t": (3, 2), "loss": (4, 1)}


def _draw_graph(values: Tensors, gradients: Tensors, *, narrow: bool) -> Figure:
    figure = new_figure(7.4, 2.9, narrow=narrow, narrow_height=5.6)
    axes = figure.subplots()
    places = {name: ((2 - y, -x) if narrow else (x, y)) for name, (x, y) in _PLACES.items()}
    for operator in GRAPH:
        for name in operator.inputs:
            axes.annotate(
                "",
                places[operator.output],
                places[name],
                arrowprops={"arrowstyle": "-|>", "color": LIGHT["muted"], "shrinkA": 22, "shrinkB": 22},
            )
    names = {operator.output: operator.name for operator in GRAPH}
    for name, (x, y) in places.items():
        is_leaf = name not in names
        colour = LIGHT["muted"] if is_leaf else LIGHT["train"]
        axes.text(
            x,
            y,
            name if is_leaf else f"{name} =\n{names[name]}",
            ha="center",
            va="center",
            weight="bold",
            color=LIGHT["ink"],
            bbox={"boxstyle": "round,pad=0.5", "facecolor": LIGHT["paper"], "edgecolor": colour},
        )
        value = f"{float(values[name]):.3f}" if name == "loss" else f"norm {float(values[name].norm()):.2f}"
        axes.text(x, y - 0.36, value, ha="center", va="top", color=LIGHT["train"], size=8)
        gradient = f"gradient {float(gradients[name].norm()):.2f}"
        axes.text(x, y - 0.52, gradient, ha="center", va="top", color=LIGHT["wrong"], size=8)
    xs, ys = zip(*places.values(), strict=True)
    axes.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.85, max(ys) + 0.5))
    axes.axis("off")
    return figure
