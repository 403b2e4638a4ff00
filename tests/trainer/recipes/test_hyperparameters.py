"""Schedules by formula, and values that no optimizer can have."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from trainer.errors import ConfigError
from trainer.recipes import RECIPES
from trainer.recipes.hyperparameters import ParamGroup, Schedule


def test_a_cosine_equals_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    schedule = Schedule(kind="cosine", final=0.1)
    for step in range(41):
        assert schedule.factor(step, 41) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    "schedule", [Schedule(kind="cosine", warmup=0.1), Schedule(points=((0, 1), (1, 0)), warmup=0.1)]
)
def test_a_warm_up_rises_in_equal_steps_and_the_rest_is_the_curve(schedule: Schedule) -> None:
    factors = [schedule.factor(step, 50) for step in range(50)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert factors[5:] == [replace(schedule, warmup=0.0).factor(step, 45) for step in range(45)]
    assert factors[-1] == pytest.approx(0)
    assert replace(schedule, warmup=0.99).factor(0, 1) > 0  # a run of one step


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParamGroup(lr=-1), "lr -1: must be at least 0"),
        (lambda: ParamGroup(lr=math.inf), "lr inf: must be at least 0"),
        (lambda: ParamGroup(lr=1, beta2=1.0), "beta2 1.0: must be at least 0 and below 1"),
        (lambda: Schedule(warmup=1.0), "warmup 1.0: must be"),
        (
            lambda: Schedule(points=((0, 1), (0.5, 0))),
            "points .*: give fractions of the run in rising order, from 0 to 1",
        ),
        (lambda: replace(RECIPES["mnist"], ema_decay=1.0), "ema_decay 1.0: must be at least 0 and below 1"),
        (lambda: replace(RECIPES["mnist"], clip_norm=-1.0), "clip_norm -1.0: must be at least 0"),
        (
            lambda: replace(RECIPES["mnist"], class_weights="balanced", balanced_sampling=True),
            "both favour rare classes: choose one",
        ),
    ],
)
def test_impossible_values_are_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
