"""The search space of a sweep: parses `--grid`, lists the candidates and applies each to a recipe."""

import itertools
import math
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import torch

from trainer.data.order import generator
from trainer.errors import ConfigError, unknown_name
from trainer.recipes import Recipe

_LIMITS = {"global_batch_size": (1, math.inf), "epochs": (1, math.inf), "label_smoothing": (0, 1)}
"""Smallest and largest value of a field; all other numbers must not be negative."""
_FIXED = ("name", "summary", "dataset", "network")
"""Fields that a sweep must not change."""

Candidate = dict[str, float | int | str]
"""Values by the field of the recipe (dotted for nested fields) or `lr_scale`."""


def make_candidates(grid: tuple[str, ...], num_random: int) -> list[Candidate]:
    """Returns the combinations of a grid, in order.

    Args:
        grid: entries such as `lr_scale=0.5,1,2`.
        num_random: number of combinations to draw at random (with a fixed seed); 0 for all.

    Raises:
        ConfigError: an entry is not FIELD=VALUE,VALUE….
    """
    axes: list[list[tuple[str, float | int | str]]] = []
    for entry in grid:
        name, equals, values = entry.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise ConfigError(f"--grid {entry}: write FIELD=VALUE,VALUE…, such as lr_scale=0.5,1,2")
        axes.append([(name, _parse(value)) for value in values.split(",")])
    combinations = [dict(combination) for combination in itertools.product(*axes)]
    if not num_random or num_random >= len(combinations):
        return combinations
    chosen = torch.randperm(len(combinations), generator=generator("sweep", 0))[:num_random]
    return [combinations[number] for number in sorted(chosen.tolist())]


def apply_candidate(recipe: Recipe, candidate: Candidate) -> Recipe:
    """Returns the recipe with a candidate's values; another global batch scales the learning rates, too.

    Raises:
        ConfigError: a field does not exist, cannot be swept, or cannot have this value.
    """
    for name, value in candidate.items():
        if name == "lr_scale":
            if isinstance(value, str) or value <= 0:
                raise ConfigError(f"--grid lr_scale={value}: must be a positive number")
            groups = {kind: replace(group, lr=group.lr * value) for kind, group in recipe.param_groups.items()}
            recipe = replace(recipe, param_groups=groups)
        elif name == "global_batch_size":
            size = _replace_field(recipe, name, name, value).global_batch_size
            recipe = recipe.with_global_batch_size(size)
        else:
            recipe = _replace_field(recipe, name, name, value)
    return recipe


def describe_candidate(candidate: Candidate) -> str:
    return ", ".join(f"{name} {value}" for name, value in candidate.items())


def _replace_field(holder: Any, path: str, full_path: str, value: float | int | str) -> Any:
    """Returns a dataclass with the field at a dotted path replaced."""
    name, _, rest = path.partition(".")
    known = [each.name for each in fields(holder)]
    if name not in known:
        raise unknown_name("field of a recipe", full_path, [*known, "lr_scale"])
    old = getattr(holder, name)
    if rest:
        if not hasattr(old, "__dataclass_fields__"):
            raise ConfigError(f"--grid {full_path}: {name} has no fields of its own")
        return replace(holder, **{name: _replace_field(old, rest, full_path, value)})
    if isinstance(old, float) and isinstance(value, int):
        value = float(value)
    if full_path == "num_validation":
        raise ConfigError("--grid num_validation: all candidates are ranked by the same validation images")
    if type(old) is not type(value) or name in _FIXED:
        raise ConfigError(
            f"--grid {full_path}={value}: a sweep changes single numbers and choices, and {full_path} is {old!r}"
        )
    choices = get_args(get_type_hints(type(holder))[name])
    if choices and value not in choices:
        raise ConfigError(f"--grid {full_path}={value}: choose from {', '.join(map(str, choices))}")
    _check_limits(full_path, value)
    return replace(holder, **{name: value})


def _check_limits(full_path: str, value: float | int | str) -> None:
    least, most = _LIMITS.get(full_path, (0, math.inf))
    if not isinstance(value, str) and not (least <= value <= most and math.isfinite(value)):
        limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise ConfigError(f"--grid {full_path}={value}: must be {limits}")


def _parse(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
