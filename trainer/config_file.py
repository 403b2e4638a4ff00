"""Files of options for a training run: `--config run.toml`, and the `run.toml` that each run writes.

epochs = 5                  # options by their names, with - or _
[set]
augment.shift = 2           # as --set augment.shift=2
[recipe]                    # a whole recipe, as a run writes it, in place of `recipe = "NAME"`
"""

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, get_args

from trainer.config import CHANGE_RECIPE, LogTo, TrainConfig, flag_of, option_of_field
from trainer.errors import ConfigError, unknown_name
from trainer.files import write_atomically
from trainer.recipes import Recipe
from trainer.recipes.fields import flatten, parse_assignments, recipe_to_table
from trainer.recipes.files import TABLE, read_toml
from trainer.typed_values import as_text, convert

RUN_TOML = "run.toml"
_NOT_WRITTEN = {"recipe", "config", "run_dir", "resume"} | CHANGE_RECIPE
"""Options that are in the table of the recipe, or belong to one call."""


def read_config_file(path: Path) -> dict[str, Any]:
    """Returns the options of a file, by the names of `TrainConfig`.

    Raises:
        ConfigError: it cannot be read, has an option that does not exist, or an impossible value.
    """
    hints = typing.get_type_hints(TrainConfig, include_extras=True)
    options: dict[str, Any] = {}
    for key, value in read_toml(path).items():
        name = key.replace("-", "_")
        if name == "set" and isinstance(value, dict):
            options["set"] = tuple(f"{field}={as_text(item)}" for field, item in flatten(value).items())
        elif name == TABLE and isinstance(value, dict):
            options["recipe"] = str(path)
        elif name not in hints or name == "config":
            known = [each.replace("_", "-") for each in hints if each != "config"]
            raise ConfigError(f"{path}: {unknown_name('option', key, known)}")
        else:
            options[name] = _convert(hints[name], value, path, key)
    return options


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The command line of a training, which wins over the file that its `--config` names.

    Args:
        arguments: for the parser.
        on_line: the options on the command line, such as `--global-batch-size`, and `--mirror` for `--no-mirror`.
        in_file: the options in the file, by the names of `TrainConfig`; none without a file.
    """

    arguments: list[str]
    on_line: frozenset[str]
    in_file: dict[str, Any]

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Self:
        """Reads the file of a command line, if it names one.

        Raises:
            ConfigError: as in `read_config_file`.
        """
        names = {argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")}
        names |= {f"--{name.removeprefix('--no-')}" for name in names if name.startswith("--no-")}
        in_file: dict[str, Any] = {}
        for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
            if argument.startswith("--config"):
                name, equals, value = argument.partition("=")
                file = value if equals else following
                if name == "--config" and file and (equals or not file.startswith("-")):  # else the parser complains
                    in_file = read_config_file(Path(file))
        joined = _values_last(arguments, "--set", lambda text: "=" in text)
        return cls(_values_last(joined, "--log-to", get_args(LogTo).__contains__), frozenset(names), in_file)

    @property
    def default(self) -> TrainConfig:
        """The values of options that the command line does not give, for the parser."""
        return TrainConfig(**{**self.in_file, "set": ()})

    @property
    def given(self) -> frozenset[str]:
        """The options on the command line and in the file."""
        return self.on_line | set(map(flag_of, self.in_file))

    def combine(self, parsed: TrainConfig) -> TrainConfig:
        """Returns the parsed options with the file's values of `--set` that the command line leaves as they are."""
        of_line = parse_assignments(parsed.set)
        of_file = {
            name: value
            for name, value in parse_assignments(self.in_file.get("set", ())).items()
            if flag_of(option_of_field(name) or "") not in self.on_line
        }
        values = tuple(f"{name}={value}" for name, value in (of_file | of_line).items())
        options = {
            option for name in of_line if (option := option_of_field(name)) and flag_of(option) not in self.on_line
        }
        unset = {option: getattr(TrainConfig(), option) for option in options}
        return replace(parsed, **unset, set=values, config=None)


def write_config_file(path: Path, config: TrainConfig, recipe: Recipe) -> None:
    """Writes the file with which the weights of a run can be trained again.

    Args:
        config: the run's options.
        recipe: as the run computes it.

    Raises:
        OSError: it cannot be written.
    """
    import tomli_w

    default = TrainConfig()
    options = {
        field.name.replace("_", "-"): _plain(getattr(config, field.name))
        for field in fields(TrainConfig)
        if field.name not in _NOT_WRITTEN
        and (field.name == "seed" or getattr(config, field.name) != getattr(default, field.name))
    }
    header = f"# Written by a run of Convoy. `convoy train --config {path.name}` trains the same weights again.\n\n"
    text = header + tomli_w.dumps({**options, TABLE: recipe_to_table(recipe)})
    write_atomically(path, text.encode(errors="surrogateescape"))  # names of files need not be UTF-8


def _values_last(arguments: Sequence[str], option: str, is_value: Callable[[str], bool]) -> list[str]:
    """Returns a command line with all values of an option together at its end, where they swallow no other argument.

    Args:
        option: with any number of values, at least one; it may be given several times.
        is_value: tells the values after the first from what follows them, such as the folder of `--set a=1 photos/`.
    """
    others: list[str] = []
    values: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name != option:
            others.append(argument)
            continue
        if equals:
            values.append(value)
        else:
            values.append(rest.pop(0) if rest and not rest[0].startswith("--") else "")
        while rest and not rest[0].startswith("--") and is_value(rest[0]):
            values.append(rest.pop(0))
    return [*others, option, *values] if values else others


def _convert(kind: Any, value: Any, path: Path, key: str) -> Any:
    try:
        return convert(kind, value, key)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _plain(value: Any) -> Any:
    """Returns an option's value as TOML has it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
