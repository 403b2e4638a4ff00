"""The price of a FLOP (pages 35 and 36 of the lecture): the lecture's card beside this machine, measured."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from matplotlib.figure import Figure

from convoy.options import option
from trainer.config import DeviceChoice
from trainer.errors import ConfigError
from trainer.models.cost import count_cost
from trainer.models.lecture import LectureNet
from trainer.ranks.world import World
from trainer.report.figures import LIGHT
from trainer.studies.folder import StudyFolder
from trainer.studies.latency import measure
from trainer.studies.page import CaptionedFigure, Cell, Column, Page, Table, write_page
from trainer.studies.plots import finish_axes, new_figure, use_log_scale

LECTURE_GFLOPS, LECTURE_DOLLARS = 8_900.0, 699.0
"""GTX 1080, as on pages 35 and 36."""
LECTURE_SECONDS = 7.0
"""Of the training on page 42, on that card."""
LECTURE_IMAGES = 10 * 60_000
"""That the training on page 42 sees: 10 epochs of MNIST."""
_PASSES = 3
"""A training step costs three forward passes: one, and two for the gradients by inputs and by weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopsConfig:
    """Measures this machine's float32 arithmetic by a matrix product, and its price if you tell it."""

    size: int = 1024
    """Rows and columns of the matrices."""
    seconds: float = 2.0
    """Time to measure."""
    price: Annotated[float | None, option("DOLLARS", "none")] = None
    """What the device costs, in dollars, for its price per GFLOP/s."""
    device: DeviceChoice = "auto"
    """auto: a GPU if there is one."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-flops-TIME")] = None
    """Folder of this study."""


def study_flops(config: FlopsConfig) -> None:
    """Runs `python -m trainer study flops`.

    Raises:
        ConfigError: a value is out of range.
    """
    if config.size < 1 or config.seconds <= 0 or (config.price is not None and config.price <= 0):
        raise ConfigError("--size must be at least 1, --seconds and --price more than 0")
    with World.join(config.device) as world, StudyFolder.open("flops", config, world) as folder:
        if world.is_main:
            gflops = measure_gflops(world.device, config.size, config.seconds)
            write_page(folder, make_page(gflops, config.price))


def measure_gflops(device: torch.device, size: int, seconds: float) -> float:
    """Returns 10^9 floating point operations a second of a product of square matrices, float32."""
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)

    def multiply() -> None:
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * size**3 / measure(multiply, seconds) / 1e9


def training_gflops() -> float:
    """Returns 10^9 operations of the training on page 42."""
    cost = count_cost(lambda: LectureNet(num_channels=1, image_size=28, num_classes=10), num_channels=1, image_size=28)
    return 2 * cost.multiply_adds * _PASSES * LECTURE_IMAGES / 1e9


def make_page(gflops: float, dollars: float | None) -> Page:
    """Returns the page.

    Args:
        gflops: of this machine.
        dollars: its price, if it is known.
    """
    work = training_gflops()
    share = work / LECTURE_SECONDS / LECTURE_GFLOPS
    here = None if dollars is None else gflops / dollars
    rows: list[tuple[Cell, ...]] = [
        ("GTX 1080, the lecture's", LECTURE_GFLOPS, LECTURE_DOLLARS, LECTURE_GFLOPS / LECTURE_DOLLARS),
        ("this machine, measured", gflops, dollars, here),
    ]
    price = (
        "Its price is not known: --price DOLLARS."
        if here is None
        else f"That is {here:.3g} GFLOP/s for a dollar; the lecture's card has {LECTURE_GFLOPS / LECTURE_DOLLARS:.1f}."
    )
    return Page(
        title="The price of a FLOP",
        findings=[
            f"This machine reaches {gflops:,.0f} GFLOP/s in float32. {price}",
            f"The lecture's training (page 42) takes {work:,.0f} GFLOP, counted by torch: {work / LECTURE_GFLOPS:.2g} "
            f"s at the speed that the lecture gives for its card. In its {LECTURE_SECONDS:.0f} s the training used "
            f"{100 * share:.0f} % of that speed.",
            "The card's speed is the lecture's figure; ours is measured with a product of large matrices.",
        ],
        figures=[
            CaptionedFigure(
                name="speed",
                title="GFLOP/s",
                caption="Billions of operations a second, float32; the card's figure is the lecture's.",
                draw=partial(_draw, gflops),
            )
        ],
        tables=[
            Table(
                name="prices",
                title="Speed and price",
                columns=(Column("device"), Column("GFLOP/s"), Column("dollars"), Column("GFLOP/s per dollar", 2)),
                rows=rows,
            )
        ],
        result={"gflops": gflops, "gflops_per_dollar": here, "lecture_training_gflop": work},
    )


def _draw(gflops: float, *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 1.9, narrow=narrow)
    axes = figure.subplots()
    values = [gflops, LECTURE_GFLOPS]
    axes.barh(["this machine", "GTX 1080"], values, color=[LIGHT["train"], LIGHT["muted"]], height=0.55)
    for place, value in enumerate(values):
        axes.annotate(f" {value:,.0f}", (value, place), va="center", color=LIGHT["ink"])
    axes.set_xlim(min(10.0, *values) / 2, max(values) * 4)
    use_log_scale(axes, "x")
    finish_axes(axes, "x")
    return figure
