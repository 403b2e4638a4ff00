"""What lies in a model repository: names, versions, and whether anything has changed. Reads no file's content."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.errors import InvalidArgument, StartupError, quote

logger = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int, int], ...]
"""Path, size, time of change and inode of each file: another tuple when any file may have changed."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's folder at one moment.

    Args:
        signature: of the files beside the versions: configuration and labels.
        versions: the signature of each version's files.
    """

    signature: Signature
    versions: dict[int, Signature]


def check_repository(path: Path) -> None:
    """See whether there can be models at all. Warns of folders that may not be read: they are passed over.

    Raises:
        StartupError: no such folder, it cannot be read, or it is a single model.
    """
    try:
        folders = [entry.path for entry in os.scandir(path) if _is_name(entry.name) and entry.is_dir()]
    except FileNotFoundError as error:
        raise StartupError(f"there is no model repository {path}") from error
    except NotADirectoryError as error:
        raise StartupError(f"the model repository {path} is not a folder") from error
    except OSError as error:
        raise StartupError(f"the model repository {path} cannot be read: {error.strerror}") from error
    for folder in folders:
        if not os.access(folder, os.R_OK | os.X_OK):
            logger.warning("no permission to read %s: it is passed over", folder)
    if _looks_like_model(path) and not model_names(path):
        raise StartupError(f"{path} is a model, not a repository of models: give the folder around it")


def check_name(name: str) -> None:
    """Only a direct, visible child of the repository can be a model; looks at the name alone.

    Raises:
        InvalidArgument: the name could lead elsewhere.
    """
    if not _is_name(name):
        raise InvalidArgument(f"{quote(name)} is no name of a model")


def model_names(repository: Path) -> list[str]:
    """Folders that hold a configuration or a version, sorted; none where the repository cannot be read."""
    return sorted(entry.name for entry in _folders(repository) if _looks_like_model(Path(entry.path)))


def has_model(repository: Path, name: str) -> bool:
    """Whether there is a model of this name, which `check_name` has seen."""
    return (repository / name).is_dir() and _looks_like_model(repository / name)


def scan_model(folder: Path) -> ModelFiles | None:
    """What is there now; None where there is no such model. A version that changes under our eyes is left out."""
    if not _looks_like_model(folder):
        return None
    versions = {}
    for entry in _folders(folder):
        if number := _version(entry.name):
            signature = scan_version(Path(entry.path))
            if signature:
                versions[number] = signature
    return ModelFiles(_signature(folder, deep=False), versions)


def scan_version(folder: Path) -> Signature:
    """Empty for a folder without files, or that is gone."""
    return _signature(folder, deep=True)


def _version(name: str) -> int:
    """The number that a version's folder is named by; 0, which is none, for another folder."""
    return int(name) if name.isascii() and name.isdecimal() and not name.startswith("0") and len(name) < 19 else 0


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"} and len(name) < 256


def _looks_like_model(folder: Path) -> bool:
    return os.path.isfile(folder / "config.pbtxt") or any(_version(entry.name) for entry in _folders(folder))


def _folders(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Visible folders, links to folders included."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if _is_name(entry.name) and entry.is_dir())
    except OSError:
        return


def _signature(folder: Path, *, deep: bool) -> Signature:
    try:
        return tuple(sorted(_files(folder, "", deep)))
    except FileNotFoundError:
        return ()  # something was removed between two looks: the next scan sees how it ended
    except OSError as error:
        return ((f"unreadable: {error.strerror}", 0, 0, 0),)  # loading it will say so


def _files(folder: Path, prefix: str, deep: bool) -> Iterator[tuple[str, int, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if deep:
                    yield from _files(Path(entry.path), f"{prefix}{entry.name}/", deep)
            else:
                status = entry.stat()
                yield f"{prefix}{entry.name}", status.st_size, status.st_mtime_ns, status.st_ino
