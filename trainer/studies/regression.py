"""Linear regression of systolic blood pressure on age (page 7 of the lecture), in closed form and by SGD.

The lecture's data are not published with it. These are generated, and say so: a line that rises by 0.9 mmHg a year,
with noise that no line explains.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from trainer.errors import ConfigError
from trainer.ranks.world import World
from trainer.report import figures
from trainer.report.figures import LIGHT
from trainer.studies.folder import StudyFolder
from trainer.studies.page import Page, Picture, Table, write_page

TRUE_SLOPE = 0.9
"""mmHg a year."""
TRUE_INTERCEPT = 95.0
"""mmHg."""
_BATCH_SIZE = 10
_PEAK_LR = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionConfig:
    """Fit a line to generated ages and blood pressures, in closed form and by stochastic gradient descent."""

    num_people: int = 60
    """Points."""
    noise: float = 14.0
    """Standard deviation around the line, mmHg."""
    seed: int = 0
    """Of the data and of SGD's order."""
    epochs: int = 400
    """Of SGD."""
    run_dir: Path | None = None
    """Folder of this study. [default: runs/study-regression-TIME]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`pressure = slope * age + intercept`, in mmHg and years."""

    slope: float
    intercept: float


def study_regression(config: RegressionConfig) -> None:
    """`python -m trainer study regression`.

    Raises:
        ConfigError: too few people for a line, or a negative noise.
    """
    if config.num_people < 3 or config.noise < 0 or config.epochs < 1:
        raise ConfigError("a line needs --num-people of at least 3, --noise of at least 0 and --epochs of at least 1")
    with (
        World.join("cpu") as world,
        figures.style(),
        StudyFolder.enter("regression", config, config.run_dir, world) as folder,
    ):
        if not world.is_main:
            return  # there is nothing to share
        ages, pressures = make_people(config.num_people, config.noise, config.seed)
        closed = fit_closed_form(ages, pressures)
        path = fit_by_sgd(ages, pressures, epochs=config.epochs, seed=config.seed)
        page = write_page(folder, _page(ages, pressures, closed, path))
        print(f"report: {page}")


def make_people(num_people: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ages in years, 10 to 80, and pressures in mmHg, both float64 `[num_people]`."""
    generator = torch.Generator().manual_seed(seed)
    ages = 10 + 70 * torch.rand(num_people, dtype=torch.float64, generator=generator)
    around = torch.randn(num_people, dtype=torch.float64, generator=generator)
    return ages, TRUE_INTERCEPT + TRUE_SLOPE * ages + noise * around


def fit_closed_form(ages: torch.Tensor, pressures: torch.Tensor) -> Line:
    """The line of least squares, by `torch.linalg.lstsq`."""
    design = torch.stack([ages, torch.ones_like(ages)], dim=1)
    slope, intercept = torch.linalg.lstsq(design, pressures[:, None]).solution[:, 0].tolist()
    return Line(slope=slope, intercept=intercept)


def fit_by_sgd(ages: torch.Tensor, pressures: torch.Tensor, *, epochs: int, seed: int) -> list[Line]:
    """The line after each epoch of SGD from zero.

    Ages and pressures are centred and scaled, or the two coefficients would need rates a thousand times apart; the
    rate falls linearly to zero, or SGD would dance around the minimum and not settle.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = (ages - ages.mean()) / ages.std(), (pressures - pressures.mean()) / pressures.std()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    lines = []
    for epoch in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(_BATCH_SIZE):
            loss = (weights[0] * x[batch] + weights[1] - y[batch]).square().mean()
            (gradient,) = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                weights -= _PEAK_LR * (1 - epoch / epochs) * gradient
        scaled = weights.detach()
        slope = float(scaled[0] * pressures.std() / ages.std())
        level = float(pressures.mean() + scaled[1] * pressures.std())
        lines.append(Line(slope=slope, intercept=level - slope * float(ages.mean())))
    return lines


def _page(ages: torch.Tensor, pressures: torch.Tensor, closed: Line, path: list[Line]) -> Page:
    last = path[-1]
    residual = float((pressures - closed.slope * ages - closed.intercept).square().mean().sqrt())
    gap = max(abs((last.slope - closed.slope) * age + last.intercept - closed.intercept) for age in (10, 80))
    rows: list[tuple[str | float | int | None, ...]] = [
        ("that made the data", TRUE_SLOPE, TRUE_INTERCEPT),
        ("least squares, closed form", closed.slope, closed.intercept),
        (f"SGD, {len(path)} epochs", last.slope, last.intercept),
    ]
    return Page(
        title="Blood pressure by age: a line, two ways (generated data)",
        findings=[
            f"Least squares finds {closed.slope:.3f} mmHg a year, SGD {last.slope:.3f}: between 10 and 80 years the "
            f"two lines are nowhere more than {gap:.2g} mmHg apart.",
            f"The data are generated, {len(ages)} people on a line of {TRUE_SLOPE} mmHg a year with noise; they are no "
            f"measurements. What the line leaves unexplained has a deviation of {residual:.1f} mmHg.",
        ],
        pictures=[
            Picture(
                name="line",
                title="The line",
                text="Systolic blood pressure against age: generated points, the line of least squares and SGD's.",
                figure=_draw_line(ages, pressures, closed, last),
            ),
            Picture(
                name="sgd",
                title="How SGD gets there",
                text="The slope after each epoch of SGD, and the slope of the closed form.",
                figure=_draw_path(closed, path),
            ),
        ],
        tables=[
            Table(name="lines", title="The lines", header=("line", "slope, mmHg a year", "intercept, mmHg"), rows=rows)
        ],
        result={
            "closed_form": [closed.slope, closed.intercept],
            "sgd": [last.slope, last.intercept],
            "largest_gap_mmhg": gap,
        },
    )


def _draw_line(ages: torch.Tensor, pressures: torch.Tensor, closed: Line, sgd: Line) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.scatter(ages, pressures, s=16, color=LIGHT["train"], alpha=0.8, linewidths=0, label="people (generated)")
    ends = np.array([10.0, 80.0])
    axes.plot(ends, closed.slope * ends + closed.intercept, color=LIGHT["wrong"], label="least squares")
    dashes = (0, (4, 4))
    axes.plot(ends, sgd.slope * ends + sgd.intercept, color=LIGHT["ink"], linestyle=dashes, label="SGD, on top of it")
    axes.set(xlim=(8, 82), ylim=(80, 240), xlabel="age, years")
    axes.set_title("Systolic blood pressure, mmHg")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.legend(loc="upper left")
    return figure


def _draw_path(closed: Line, path: list[Line]) -> Figure:
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(closed.slope, color=LIGHT["wrong"], label="least squares")
    axes.plot(range(1, len(path) + 1), [line.slope for line in path], color=LIGHT["train"], label="SGD")
    axes.set(xlim=(0, len(path)), xlabel="epoch")
    axes.set_ylim(bottom=0)
    axes.set_title("Slope, mmHg a year")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.legend(loc="lower right")
    return figure
