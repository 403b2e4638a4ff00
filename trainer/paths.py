"""Paths from the names of data sets and from the environment, and of files in the folders of runs."""

import os
import re
import unicodedata
from pathlib import Path

from trainer.errors import ConfigError

FOLDER_PREFIX = "folder:"
"""Before the path of a folder of images, in the name of a data set."""
RESULT_FILE = "result.json"
"""In a run's folder: written last, when the run is complete."""
LEDGER_FILE = "ledger.jsonl"
"""In the folder that holds the runs: the evaluations on test sets."""
FAILURE_FILE = "failure.json"
"""In a run's folder: the report of the last failure."""
CHECKPOINTS = "checkpoints"
"""In a run's folder: the folder of its checkpoints."""
LOCK_FILE = ".in-use"
"""In the folder of a run or a study: locked by the process that uses the folder."""
STUDY_FILE = "study.json"
"""In a study's folder, and nowhere else."""


def run_folders(path: Path) -> list[Path]:
    """Returns the folders of a study's runs, or the folder itself if it is no study's."""
    is_study = (path / STUDY_FILE).exists()
    return [config.parent for config in sorted(path.glob("*/config.json"))] if is_study else [path]


def image_folder(name: str) -> Path | None:
    """Returns the absolute path of the folder of images of that name, or None for the name of another data set.

    Raises:
        ConfigError: the name has no path.
    """
    if not name.startswith(FOLDER_PREFIX):
        return None
    if name == FOLDER_PREFIX:
        raise ConfigError("folder: needs a path, as in folder:/data/birds")
    return Path(os.path.abspath(os.path.expanduser(name.removeprefix(FOLDER_PREFIX))))


def full_name(name: str) -> str:
    """Returns a data set's name that holds in every working directory: a folder's has its absolute path."""
    root = image_folder(name)
    return name if root is None else f"{FOLDER_PREFIX}{root}"


def default_data_dir() -> Path:
    """Returns `$XDG_CACHE_HOME/convoy`, or `~/.cache/convoy`, as it is if the user has no home directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")) / "convoy"


def expand_home(data_dir: Path) -> Path:
    """Replaces `~` at the start of a path. Called when the path is used: help needs no home directory.

    Raises:
        ConfigError: the user has no home directory, as in some containers.
    """
    if data_dir.parts[:1] != ("~",):
        return data_dir
    try:
        return data_dir.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{data_dir} is the folder for data sets, but this user has no home directory: give --data-dir"
        ) from error


def check_model_name(name: str) -> None:
    """Checks the name of a model, which is the name of a folder and a part of addresses.

    Raises:
        ConfigError: it is not valid.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"--name {name}: a model name consists of letters, digits, '_', '-' and '.', and starts with a letter or a "
            "digit"
        )


def default_model_name(dataset: str, recipe: str) -> str:
    """Returns the name of a run's model: the folder's of its images as far as it is valid, or the recipe's."""
    root = image_folder(dataset)
    if root is None:
        return recipe
    letters = unicodedata.normalize("NFKD", root.name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", letters).strip("-_.") or recipe
