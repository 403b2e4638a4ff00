"""Linear regression of systolic blood pressure on age (page 7 of the lecture), in closed form and by SGD.

The lecture's data are not published with it. The data here are generated and labelled so: a line that rises by 0.9 mmHg
a year, with noise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from convoy.options import option
from trainer.errors import ConfigError
from trainer.ranks.world import World
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page
from trainer.studies.regression_page import Line, make_page

TRUE_LINE = Line(slope=0.9, intercept=95.0)
_BATCH_SIZE = 10
_PEAK_LR = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionConfig:
    """Fits a line to generated ages and blood pressures, in closed form and by stochastic gradient descent."""

    num_people: int = 60
    """Number of points."""
    noise: float = 14.0
    """Standard deviation around the line, mmHg."""
    seed: int = 0
    """Seed of the data and of SGD's order."""
    epochs: int = 400
    """Epochs of SGD."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-regression-TIME")] = None
    """Folder of this study."""


def study_regression(config: RegressionConfig) -> None:
    """Runs `python -m trainer study regression`.

    Raises:
        ConfigError: there are too few people for a line, or the noise is negative.
    """
    if config.num_people < 3 or config.noise < 0 or config.epochs < 1:
        raise ConfigError("--num-people must be at least 3, --noise must not be negative, --epochs must be at least 1")
    with World.join("cpu") as world, StudyFolder.open("regression", config, world) as folder:
        if not world.is_main:
            return  # one rank suffices
        ages, pressures = make_people(config.num_people, config.noise, config.seed)
        least_squares = fit_closed_form(ages, pressures)
        sgd = fit_by_sgd(ages, pressures, epochs=config.epochs, seed=config.seed)
        write_page(folder, make_page(ages, pressures, least_squares, sgd, TRUE_LINE))


def make_people(num_people: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ages in years, 10 to 80, and pressures in mmHg, both float64 `[num_people]`."""
    generator = torch.Generator().manual_seed(seed)
    ages = 10 + 70 * torch.rand(num_people, dtype=torch.float64, generator=generator)
    residuals = noise * torch.randn(num_people, dtype=torch.float64, generator=generator)
    return ages, TRUE_LINE.intercept + TRUE_LINE.slope * ages + residuals


def fit_closed_form(ages: torch.Tensor, pressures: torch.Tensor) -> Line:
    """Returns the line of least squares, computed by `torch.linalg.lstsq`."""
    design = torch.stack([ages, torch.ones_like(ages)], dim=1)
    slope, intercept = torch.linalg.lstsq(design, pressures[:, None]).solution[:, 0].tolist()
    return Line(slope=slope, intercept=intercept)


def fit_by_sgd(ages: torch.Tensor, pressures: torch.Tensor, *, epochs: int, seed: int) -> list[Line]:
    """Returns the line after each epoch of SGD, which starts from zero.

    Ages and pressures are standardised: otherwise the two coefficients would need learning rates a thousand times
    apart. The learning rate falls linearly to zero: otherwise SGD would oscillate around the minimum.
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
        standardized = weights.detach()
        slope = float(standardized[0] * pressures.std() / ages.std())
        level = float(pressures.mean() + standardized[1] * pressures.std())
        lines.append(Line(slope=slope, intercept=level - slope * float(ages.mean())))
    return lines
