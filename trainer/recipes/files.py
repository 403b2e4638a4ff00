"""Recipes by the names on a command line: one of Convoy's, one of the user's Python file, or one of a TOML file."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

from convoy.named_files import read_file
from trainer.errors import ConfigError
from trainer.recipes import Recipe, find_recipe
from trainer.recipes.fields import check_recipe, recipe_from_table
from trainer.user_code import is_reference, load_object, user_errors

TABLE = "recipe"
"""The table of a TOML file that holds a recipe."""


def load_recipe(reference: str) -> Recipe:
    """Returns the recipe that a command line names.

    Args:
        reference: a name of `RECIPES`; FILE.py:OBJECT, a Recipe or a function that returns one; or a TOML file with a
            table `[recipe]`, such as a run's `run.toml`.

    Raises:
        ConfigError: there is no such recipe, or it is faulty.
    """
    if is_reference(reference):
        return _from_user_code(reference)
    if reference.endswith(".toml"):
        return _from_toml(Path(reference))
    return find_recipe(reference)


def read_toml(path: Path) -> dict[str, object]:
    """Returns the content of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML; the message names the line.
    """
    try:
        return tomllib.loads(read_file(path).decode("utf-8", "surrogateescape"))  # of names of files
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None


def _from_user_code(reference: str) -> Recipe:
    found, sha256 = load_object(reference)
    if callable(found):
        with user_errors(reference):
            found = found()
    if not isinstance(found, Recipe):
        raise ConfigError(f"{reference} is of type {type(found).__name__}: it must be a Recipe of trainer.recipes")
    recipe = _checked(found, reference)
    return replace(recipe, file_sha256={**recipe.file_sha256, "recipe": sha256})


def _from_toml(path: Path) -> Recipe:
    table = read_toml(path).get(TABLE)
    if not isinstance(table, dict):
        raise ConfigError(f"{path} has no table [{TABLE}]")
    try:
        recipe = recipe_from_table(table)
    except ConfigError as error:
        raise ConfigError(f"{path}, [{TABLE}]: {error}") from None
    return _checked(recipe, str(path))


def _checked(recipe: Recipe, reference: str) -> Recipe:
    try:
        recipe = check_recipe(recipe)
    except ConfigError as error:
        raise ConfigError(f"{reference}: {error}") from None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", recipe.name):
        raise ConfigError(
            f"{reference}: the recipe's name {recipe.name!r} must consist of letters, digits, '_', '-' and '.', and "
            "start with a letter or a digit"
        )
    return recipe
