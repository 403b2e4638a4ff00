"""The user's own network: a class, or a function that returns a module, in a Python file."""

import inspect
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.user_code import load_object, user_errors

_ARGUMENTS = ("num_classes", "num_channels", "image_size")


def build_own(reference: str, *, num_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Calls the user's class or function with those of the three arguments that its signature names.

    Args:
        reference: FILE.py:NAME.

    Raises:
        ConfigError: the file cannot be loaded, the call fails, or it does not return a module; the message names file
            and line.
    """
    shape = {"num_classes": num_classes, "num_channels": num_channels, "image_size": image_size}
    target, _ = load_object(reference)
    names = _names_of_arguments(reference, target)
    with user_errors(reference):
        network = target(**{name: value for name, value in shape.items() if name in names})
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        raise ConfigError(
            f"{reference} returns {type(network).__name__}: it must be a torch.nn.Module, and not scripted"
        )
    return network


def takes_num_channels(reference: str) -> bool:
    """Returns whether the user's class or function is told how many channels the images have."""
    return "num_channels" in _names_of_arguments(reference, load_object(reference)[0])


def _names_of_arguments(reference: str, target: Any) -> set[str]:
    """Returns the arguments that a class or function takes.

    Raises:
        ConfigError: it cannot be called, or needs an argument that Convoy does not know.
    """
    if not callable(target):
        raise ConfigError(f"{reference} is of type {type(target).__name__}: it must be a class or a function")
    parameters = inspect.signature(target).parameters.values()
    unknown = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (parameter.name not in _ARGUMENTS or parameter.kind is parameter.POSITIONAL_ONLY)
    ]
    if unknown:
        raise ConfigError(
            f"{reference} needs the argument {unknown[0]!r}, and Convoy knows {', '.join(_ARGUMENTS)} only: give it a "
            "default value"
        )
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
