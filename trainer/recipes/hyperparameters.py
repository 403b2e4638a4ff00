"""The parts of a recipe that say how its weights change: optimizers by group of parameters, and the schedule.

Knows nothing about models and hardware; imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.errors import ConfigError

ParameterKind = Literal["stem", "filters", "matrices", "vectors", "head"]
OptimizerName = Literal["sgd", "muon", "adamw"]
ClassWeights = Literal["none", "balanced"]
BestBy = Literal["accuracy", "balanced-accuracy", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """The optimizer and its settings for one group of parameters.

    `lr` is multiplied by the schedule's factor. `weight_decay` is decoupled and relative to `lr`: each step shrinks
    the weights by lr · weight_decay.
    """

    lr: float
    """Learning rate of the mean gradient over a batch."""
    momentum: float = 0.0
    """Nesterov momentum of `sgd` and `muon`; `adamw` has `beta1` in its place."""
    weight_decay: float = 0.0
    """Share of the weights, times the learning rate, by which each step shrinks them."""
    optimizer: OptimizerName = "sgd"
    """`muon`: the update is the nearest semi-orthogonal matrix, and the filter keeps the norm sqrt(filters). `adamw`:
    Adam with decoupled weight decay (arXiv 1711.05101)."""
    beta1: float = 0.9
    """Decay per step of AdamW's mean of gradients."""
    beta2: float = 0.999
    """Decay per step of AdamW's mean of squared gradients."""
    epsilon: float = 1e-8
    """AdamW's smallest divisor."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            check_number(name, getattr(self, name), 0, math.inf)
        for name in ("momentum", "beta1", "beta2"):
            check_number(name, getattr(self, name), 0, 1, excludes_most=True)
        check_number("epsilon", self.epsilon, 0, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate's factor over a run: a linear warm-up if there is one, then a curve over the rest."""

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0), (1.0, 1.0))
    """For the kind `points`: (fraction of the run, factor) in rising order of fractions, from 0 to 1."""
    kind: Literal["points", "cosine"] = "points"
    """`points`: linear between `points`. `cosine`: half a period of a cosine from 1 to `final` (arXiv 1608.03983)."""
    warmup: float = 0.0
    """Fraction of the run, from 0 to below 1, in which the factor rises in equal steps to the curve's first value."""
    final: float = 0.0
    """For the kind `cosine`: the factor of the last step."""

    def __post_init__(self) -> None:
        check_number("warmup", self.warmup, 0, 1, excludes_most=True)
        check_number("final", self.final, 0, math.inf)
        fractions = [at for at, _ in self.points]
        if len(fractions) < 2 or (fractions[0], fractions[-1]) != (0, 1) or fractions != sorted(set(fractions)):
            raise ConfigError(f"points {self.points}: give fractions of the run in rising order, from 0 to 1")

    def factor(self, step: int, num_steps: int) -> float:
        """Returns the factor at a step, counted from 0."""
        num_warmup = round(self.warmup * num_steps)
        if step < num_warmup:
            return self._curve(0.0) * (step + 1) / (num_warmup + 1)
        return self._curve((step - num_warmup) / max(1, num_steps - 1 - num_warmup))

    def _curve(self, at: float) -> float:
        """Returns the factor at a fraction of the run after the warm-up."""
        if self.kind == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * at)) / 2
        for (x0, y0), (x1, y1) in zip(self.points, self.points[1:], strict=False):
            if at <= x1:
                return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
        return self.points[-1][1]


def check_number(name: str, value: float, least: float, most: float, *, excludes_most: bool = False) -> None:
    """Checks a field.

    Raises:
        ConfigError: the value is not finite, or outside of the limits.
    """
    if math.isfinite(value) and least <= value <= most and not (excludes_most and value == most):
        return
    if most == math.inf:
        limits = f"at least {least}"
    else:
        limits = f"at least {least} and {'below' if excludes_most else 'at most'} {most}"
    raise ConfigError(f"{name} {value}: must be {limits}")
