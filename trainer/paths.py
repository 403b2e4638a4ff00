"""Paths that a data set's name and the environment stand for."""

import os
from pathlib import Path

from trainer.errors import ConfigError

FOLDER_PREFIX = "folder:"
"""Before the path of a folder of images, in the name of a data set."""


def image_folder(name: str) -> Path | None:
    """Returns the absolute path of the folder of images of that name, or None for the name of another data set.

    Raises:
        ConfigError: the name has no path.
    """
    if not name.startswith(FOLDER_PREFIX):
        return None
    if name == FOLDER_PREFIX:
        raise ConfigError("folder: needs a path, as in folder:/data/birds")
    return Path(os.path.abspath(Path(name.removeprefix(FOLDER_PREFIX)).expanduser()))


def full_name(name: str) -> str:
    """Returns a data set's name that holds in every working directory: a folder's has its absolute path."""
    root = image_folder(name)
    return name if root is None else f"{FOLDER_PREFIX}{root}"


def default_data_dir() -> Path:
    """Returns `$XDG_CACHE_HOME/convoy`, or `~/.cache/convoy`."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "convoy"
