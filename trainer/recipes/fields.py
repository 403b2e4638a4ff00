"""The fields of a recipe by their dotted names, such as `augment.shift`: their types, their help, and new values.

Knows no particular field, so that a new field of a recipe can be set at once. Imports no torch.
"""

import ast
import inspect
import math
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

from trainer.errors import ConfigError, list_names
from trainer.recipes import Recipe
from trainer.typed_values import as_text, convert, describe_kind, parse, unknown_field

FIXED = ("name", "summary", "file_sha256")
"""Fields that no command line sets."""
LIMITS = {
    "global_batch_size": (1, math.inf),
    "epochs": (1, math.inf),
    "num_validation": (0, math.inf),
}
"""Smallest and largest value of a field; other numbers must not be negative, and a recipe's parts check themselves."""
_SHOWN_BY = "`convoy recipes NAME` shows a recipe's fields"


@dataclass(frozen=True, slots=True)
class RecipeField:
    """One field of a recipe, for the user.

    Args:
        name: dotted.
        kind: its type.
        help: in plain words; empty if the field has none.
    """

    name: str
    kind: Any
    value: Any
    help: str


def list_fields(recipe: Recipe) -> list[RecipeField]:
    """Returns all fields that can be set."""
    return [field for field in _walk("", recipe) if field.name not in FIXED]


def set_fields(recipe: Recipe, values: Mapping[str, str]) -> Recipe:
    """Returns a recipe with new values. Another global batch scales the learning rates that are not set.

    Args:
        values: the text of each value by the field's dotted name.

    Raises:
        ConfigError: there is no such field, or it cannot have this value.
    """
    for name in sorted(values, key=lambda name: name != "global_batch_size"):  # first: the rates are set after it
        changed = _set_field(recipe, name, name, values[name], recipe)
        if name == "global_batch_size":
            changed = recipe.with_global_batch_size(changed.global_batch_size)
        recipe = changed
    return recipe


def describe_recipe(recipe: Recipe) -> Iterator[str]:
    """Yields lines with all fields of a recipe, their values, types and help, for the user."""
    yield f"{recipe.name}: {recipe.summary}"
    yield ""
    told: set[str] = set()
    for field in list_fields(recipe):
        yield f"{field.name} = {as_text(field.value)}"
        help_line = f"{field.help} [{describe_kind(field.kind)}]".strip()
        if help_line not in told:  # the same for each group of parameters
            yield from textwrap.wrap(help_line, 100, initial_indent="    ", subsequent_indent="    ")
        told.add(help_line)


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Returns the values of `FIELD=VALUE` texts by their fields; of several for one field, the last.

    Raises:
        ConfigError: a text is not FIELD=VALUE.
    """
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            what = f"--set {assignment}".strip()
            raise ConfigError(f"{what}: write FIELD=VALUE, such as augment.shift=2; {_SHOWN_BY}")
        values[name.strip()] = value.strip()
    return values


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested tables by dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def recipe_to_table(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe as nested tables of TOML, from which `recipe_from_table` makes the same recipe."""
    return typing.cast(dict[str, Any], _to_table(recipe))


def recipe_from_table(table: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of `recipe_to_table`.

    Raises:
        ConfigError: a field is missing or unknown, or has an impossible value.
    """
    recipe: Recipe = convert(Recipe, table, "")
    return check_recipe(recipe)


def check_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe with the types that its fields declare, such as a tuple for a list.

    Raises:
        ConfigError: a field has a value of another type, or an impossible one.
    """
    checked: Recipe = convert(Recipe, recipe, "")
    for field in list_fields(checked):
        _check_limits(field.name, field.value)
    return checked


def _walk(prefix: str, value: Any) -> Iterator[RecipeField]:
    """Yields the fields of a dataclass and of the dataclasses in it."""
    hints, helps = typing.get_type_hints(type(value)), _help_of(type(value))
    for field in fields(value):
        name, item = f"{prefix}{field.name}", getattr(value, field.name)
        if is_dataclass(item):
            yield from _walk(f"{name}.", item)
        elif isinstance(item, dict) and any(map(is_dataclass, item.values())):
            for key, each in item.items():
                yield from _walk(f"{name}.{key}.", each)
        else:
            yield RecipeField(name, hints[field.name], item, helps.get(field.name, ""))


def _help_of(kind: type) -> dict[str, str]:
    """Returns the texts below the fields of a dataclass."""
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as docstring)):
                found[name] = " ".join(docstring.split())
    return found


def _set_field(holder: Any, path: str, full_path: str, text: str, recipe: Recipe) -> Any:
    """Returns a dataclass, or a dict of dataclasses, with the field at a dotted path set."""
    name, _, rest = path.partition(".")
    hints = dict.fromkeys(holder) if isinstance(holder, dict) else typing.get_type_hints(type(holder))
    if full_path in FIXED:
        raise ConfigError(f"--set {full_path}: the recipe's own {full_path} cannot be set")
    if name not in hints:
        raise unknown_field(full_path, _names(recipe))
    old = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    nested = old if old is not None else _new_nested(hints[name])
    if rest:
        if not (isinstance(nested, dict) or is_dataclass(nested)):
            raise ConfigError(f"--set {full_path}: {full_path.removesuffix(f'.{rest}')} has no fields of its own")
        value = _set_field(nested, rest, full_path, text, recipe)
    elif is_dataclass(old) or isinstance(old, dict):
        names = [each for each in _names(recipe) if each.startswith(f"{full_path}.")]
        raise ConfigError(f"--set {full_path}: set one of its fields: {list_names(names)}; {_SHOWN_BY}")
    else:
        value = parse(hints[name], text, full_path)
        _check_limits(full_path, value)
        value = old if value == old else value  # 10 for 10.0: digests know the difference
    if isinstance(holder, dict):
        return {**holder, name: value}
    try:
        return replace(holder, **{name: value})
    except ConfigError as error:
        raise ConfigError(f"--set {full_path}={text}: {error}") from None


def _names(recipe: Recipe) -> list[str]:
    return [field.name for field in list_fields(recipe)]


def _new_nested(kind: Any) -> Any:
    """Returns the default of the dataclass that an optional field may hold, None if there is none."""
    for arm in typing.get_args(kind):
        if is_dataclass(arm) and isinstance(arm, type):
            required = [field for field in fields(arm) if field.default is field.default_factory is MISSING]
            return None if required else arm()
    return None


def _check_limits(name: str, value: Any) -> None:
    least, most = LIMITS.get(name, (0, math.inf))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not (least <= number <= most and math.isfinite(number)):
            limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise ConfigError(f"{name} = {as_text(value)}: must be {limits}")


def _to_table(value: Any) -> Any:
    """Returns a value as TOML has it. TOML has no null: a None that is no default becomes `none`."""
    if is_dataclass(value) and not isinstance(value, type):
        items = ((field, getattr(value, field.name)) for field in fields(value))
        return {
            field.name: "none" if item is None else _to_table(item)
            for field, item in items
            if not (item is None and field.default is None)
        }
    if isinstance(value, dict):
        return {key: _to_table(item) for key, item in value.items()}
    return [_to_table(item) for item in value] if isinstance(value, tuple) else value
