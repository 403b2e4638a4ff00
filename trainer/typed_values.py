"""Values of the types that dataclasses declare, from the command line and from TOML, and errors in plain words.

Imports no torch.
"""

import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError


def convert(kind: Any, value: Any, name: str) -> Any:
    """Returns a value of TOML, or of another such source, as a value of the type `kind`.

    Args:
        kind: a plain type, a Literal, a union, a tuple, a dict, or a dataclass with such fields.
        name: of the value, for the error.

    Raises:
        ConfigError: it is of another type.
    """
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is typing.Annotated:
        return convert(arguments[0], value, name)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(kind, value, name)
    if is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            value = {field.name: getattr(value, field.name) for field in fields(kind)}
        if isinstance(value, Mapping):
            return _build(kind, value, name)
    elif origin in (tuple, list, dict):
        if isinstance(value, Mapping if origin is dict else list | tuple):
            return _convert_items(kind, value, name)
    elif _is_plain(kind, value):
        return Path(value) if kind is Path else value
    raise ConfigError(f"{name} = {_as_item(value)}: must be {describe_kind(kind)}")


def convert_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of a dataclass, as a JSON file has them, with their types.

    Raises:
        ValueError: one is of another type.
    """
    hints = typing.get_type_hints(kind)
    try:
        return {name: convert(hints[name], value, name) for name, value in values.items()}
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _is_plain(kind: Any, value: Any) -> bool:
    """Returns whether a value is of a plain type or one of a Literal. An int may stand for a float."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    others = {float: int | float, Path: str | Path}
    return isinstance(value, others.get(kind, kind))


def _convert_items(kind: Any, value: Any, name: str) -> Any:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return {
            convert(arguments[0], key, f"the name {_join(name, key)}"): convert(arguments[1], item, _join(name, key))
            for key, item in value.items()
        }
    is_list = typing.get_origin(kind) is list
    kinds = arguments[:1] * len(value) if is_list or arguments[1:] == (...,) else arguments
    if len(kinds) != len(value):
        raise ConfigError(f"{name} = {_as_item(value)}: must be {describe_kind(kind)}")
    items = (convert(*pair, name) for pair in zip(kinds, value, strict=True))
    return list(items) if is_list else tuple(items)


def _convert_union(kind: Any, value: Any, name: str) -> Any:
    arms = typing.get_args(kind)
    if types.NoneType in arms and value in (None, "none"):
        return None
    arms = tuple(arm for arm in arms if arm is not types.NoneType)
    for arm in arms:
        try:
            return convert(arm, value, name)
        except ConfigError:
            if len(arms) == 1 and is_dataclass(arm) and isinstance(value, Mapping):
                raise  # names the field of the table
    raise ConfigError(f"{name} = {_as_item(value)}: must be {describe_kind(kind)}")


def parse(kind: Any, text: str, name: str) -> Any:
    """Returns a value from the command line: as in TOML, but texts and lists need no quotes and brackets.

    Args:
        name: of the recipe's field.

    Raises:
        ConfigError: it is of another type.
    """
    for candidate in (text, text.lower(), f"[{text}]"):
        try:
            value = convert(kind, tomllib.loads(f"value = {candidate}")["value"], name)
            return float(value) if kind is float else value
        except (tomllib.TOMLDecodeError, ConfigError):
            continue
    for number in (int, float):  # such as .1, which is no number of TOML
        try:
            return convert(kind, number(text), name)
        except (ValueError, ConfigError):
            continue
    try:
        return convert(kind, "none" if text.lower() == "none" else text, name)
    except ConfigError:
        raise ConfigError(f"--set {name}={text}: must be {describe_kind(kind)}") from None


def _build(kind: type, table: Mapping[str, Any], name: str) -> Any:
    """Returns a dataclass from a table."""
    hints = typing.get_type_hints(kind)
    for key in table:
        if key not in hints:
            raise unknown_field(_join(name, key), [_join(name, known) for known in hints])
    for field in fields(kind):
        if field.default is field.default_factory is MISSING and field.name not in table:
            raise ConfigError(f"{_join(name, field.name)} is missing: must be {describe_kind(hints[field.name])}")
    return kind(**{key: convert(hints[key], value, _join(name, key)) for key, value in table.items()})


def describe_kind(kind: Any) -> str:
    """Returns a type in plain words, such as `a number`."""
    arguments = typing.get_args(kind)
    match typing.get_origin(kind):
        case typing.Annotated:
            return describe_kind(arguments[0])
        case typing.Union | types.UnionType:
            return " or ".join(describe_kind(argument) for argument in arguments)
        case typing.Literal:
            return " or ".join(map(str, arguments))
        case origin if origin in (tuple, list):
            number = "" if arguments[1:] == (...,) else f"{len(arguments)} "
            return f"a list of {number}{_PLURALS.get(arguments[0], 'values')}"
        case origin if origin is dict:
            return "a table"
    return _IN_WORDS.get(kind, "a table" if is_dataclass(kind) else getattr(kind, "__name__", str(kind)))


_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    types.NoneType: "none",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "trues and falses"}


def as_text(value: Any) -> str:
    """Returns a value as `--set` reads it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_item, value))}]"
    return str(value)


def _as_item(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else as_text(value)


def unknown_field(name: str, known: Iterable[str]) -> ConfigError:
    """Returns the error for a field that does not exist, with the nearest names that do."""
    names = list(known)
    close = [each for each in names if each.endswith(f".{name}")]
    close += [each for each in difflib.get_close_matches(name, names, n=3, cutoff=0.6) if each not in close]
    hint = f"did you mean {' or '.join(close[:4])}?" if close else "`convoy recipes NAME` lists a recipe's fields"
    return ConfigError(f"no field {name!r}: {hint}")


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)
