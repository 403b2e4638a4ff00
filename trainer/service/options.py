"""What a service can tell of a training's options when it is submitted, without the training's own parser.

That parser captures what the process prints, reads files and runs the user's code: it belongs to the command line, and
to the training itself, which has the last word.
"""

import typing
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from convoy.printable import printable
from trainer.config import TrainConfig, flag_of
from trainer.errors import ConfigError, unknown_name
from trainer.recipes import find_recipe
from trainer.typed_values import describe_kind, parse
from trainer.user_code import is_reference

MAX_SHOWN = 100
"""Characters of a wrong name or value in an error, which are the caller's."""


def check_options(arguments: Sequence[str]) -> None:
    """Checks the names and values of options, and the name of the recipe; not `--set`, and no file.

    Args:
        arguments: of a training. What follows no option is left to the training.

    Raises:
        ConfigError: says which option is wrong.
    """
    config = replace(TrainConfig(), **{name: _value(name, text) for name, text in _texts(arguments).items()})
    config.check_values()
    if not is_reference(config.recipe) and not config.recipe.endswith(".toml"):
        find_recipe(_shown(config.recipe))


def _texts(arguments: Sequence[str]) -> dict[str, str]:
    """Returns the last value of each option that has one value, by the names of `TrainConfig`."""
    texts, kinds = {}, _kinds()
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or _is_switch(kinds.get(name.removeprefix("no_"))):
            continue
        if name not in kinds:
            raise unknown_name("option", _shown(flag), map(flag_of, kinds))
        if typing.get_origin(kinds[name]) is not tuple:
            texts[name] = value if equals else "" if following.startswith("--") else following
    return texts


def _value(name: str, text: str) -> Any:
    kind, flag = _kinds()[name], flag_of(name)
    expected = describe_kind(kind).removesuffix(" or none")
    if not text:
        raise ConfigError(f"{flag} needs {expected}")
    try:
        return parse(kind, text, name)
    except ConfigError:
        raise ConfigError(f"{flag} {_shown(text)}: must be {expected}") from None


def _is_switch(kind: Any) -> bool:
    return bool in (kind, *typing.get_args(kind))


@cache
def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _shown(text: str) -> str:
    return printable(text[:MAX_SHOWN])
