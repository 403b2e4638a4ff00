"""The search space of a sweep: parses `--grid`, lists the candidates and applies each to a recipe."""

import itertools
import math
import re
from dataclasses import replace

import torch

from trainer.data.order import generator
from trainer.errors import ConfigError
from trainer.network_files import with_files
from trainer.recipes import Recipe
from trainer.recipes.fields import parse_assignments, set_fields
from trainer.typed_values import as_text

_FIXED = ("dataset", "num_validation", "square")
"""Fields that a sweep must not change: they decide the validation images."""

_BETWEEN_VALUES = re.compile(r",(?![^\[]*\])")
"""A comma that is not inside a list's brackets."""

Candidate = dict[str, float | int | str]
"""Values by the field of the recipe (dotted for nested fields) or `lr_scale`."""


def make_candidates(grid: tuple[str, ...], num_random: int) -> list[Candidate]:
    """Returns the combinations of a grid, in order.

    Args:
        grid: entries such as `lr_scale=0.5,1,2` or, for a field that is a list, `widths=[8,16],[16,32]`.
        num_random: number of combinations to draw at random (with a fixed seed); 0 for all.

    Raises:
        ConfigError: an entry is not FIELD=VALUE,VALUE…, a bracket is missing, or two entries are of one field.
    """
    axes: list[list[tuple[str, float | int | str]]] = []
    for entry in grid:
        name, _, text = entry.partition("=")
        values = _BETWEEN_VALUES.split(text)
        if not name or not all(values):
            raise ConfigError(
                f"--grid {entry}: write FIELD=VALUE,VALUE…, such as lr_scale=0.5,1,2 or 'widths=[8,16],[16,32]'"
            )
        if any(value.count("[") != value.count("]") for value in values):
            raise ConfigError(f"--grid {entry}: a bracket is missing; write lists as in 'widths=[8,16],[16,32]'")
        if any(name == axis[0][0] for axis in axes):
            raise ConfigError(f"--grid {entry}: {name} is there twice; write all its values in one list")
        axes.append([(name, _parse(value)) for value in values])
    combinations = [dict(combination) for combination in itertools.product(*axes)]
    if not num_random or num_random >= len(combinations):
        return combinations
    chosen = torch.randperm(len(combinations), generator=generator("sweep", 0))[:num_random]
    return [combinations[number] for number in sorted(chosen.tolist())]


def apply_candidate(recipe: Recipe, candidate: Candidate, assignments: tuple[str, ...] = ()) -> Recipe:
    """Returns the recipe with a candidate's values; another global batch scales the learning rates, too.

    Args:
        recipe: without the sweep's own values: a rate among them is not scaled, as none that a training sets is.
        assignments: FIELD=VALUE of the sweep, for all candidates.

    Raises:
        ConfigError: a field does not exist, cannot be swept, or cannot have this value.
    """
    values = {name: as_text(value) for name, value in candidate.items() if name != "lr_scale"}
    for name in values:
        if name in _FIXED:
            raise ConfigError(f"--grid {name}: all candidates are ranked by the same validation images")
    try:
        recipe = set_fields(recipe, parse_assignments(assignments) | values)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--set ", "--grid ")) from None
    scale = candidate.get("lr_scale", 1)
    if isinstance(scale, str) or not 0 < scale < math.inf:
        raise ConfigError(f"--grid lr_scale={scale}: must be a positive number")
    groups = {kind: replace(group, lr=group.lr * scale) for kind, group in recipe.param_groups.items()}
    return with_files(replace(recipe, param_groups=groups))


def describe_candidate(candidate: Candidate) -> str:
    return ", ".join(f"{name} {value}" for name, value in candidate.items())


def without_rates(candidate: Candidate) -> Candidate:
    """Returns a candidate's values but those of optimizers."""
    return {
        name: value for name, value in candidate.items() if name != "lr_scale" and not name.startswith("param_groups.")
    }


def as_options(candidate: Candidate, assignments: tuple[str, ...] = ()) -> list[str]:
    """Returns the options of a training run with a candidate's values.

    Args:
        assignments: FIELD=VALUE of the sweep, which the candidate's values come after.
    """
    values = [*assignments, *(f"{name}={as_text(value)}" for name, value in candidate.items() if name != "lr_scale")]
    scale = ["--lr-scale", str(candidate["lr_scale"])] if candidate.get("lr_scale", 1) != 1 else []
    return [*scale, *(["--set", *values] if values else [])]


def _parse(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
