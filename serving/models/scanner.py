"""Scans a model repository: which models and versions exist, and whether their files changed. Reads no contents."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.errors import InvalidArgument, StartupError, quote

logger = logging.getLogger(__name__)

FileStats = tuple[tuple[str, int, int, int], ...]
"""Path, size in bytes, modification time in ns and inode of each file. Differs whenever a file may have changed."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model, as one scan found them.

    Args:
        own: the files beside the versions: configuration and labels.
        versions: the files of each version.
    """

    own: FileStats
    versions: dict[int, FileStats]


def check_repository(path: Path) -> None:
    """Checks that a folder can be a model repository. Warns of folders in it that cannot be read and are skipped.

    Raises:
        StartupError: the folder does not exist, cannot be read, or is a single model.
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
            logger.warning("no permission to read %s: skipped", folder)
    if _looks_like_model(path) and not model_names(path):
        raise StartupError(f"{path} is a model, not a repository of models: use its parent folder")


def check_name(name: str) -> None:
    """Checks that a name can only refer to a direct, visible child of the repository. Checks nothing else.

    Raises:
        InvalidArgument: the name is empty, hidden or could be a path.
    """
    if not _is_name(name):
        raise InvalidArgument(f"{quote(name)} is not a valid model name")


def model_names(repository: Path) -> list[str]:
    """Returns the folders that hold a configuration or a version, sorted; none if the repository cannot be read."""
    return sorted(entry.name for entry in _folders(repository) if _looks_like_model(Path(entry.path)))


def has_model(repository: Path, name: str) -> bool:
    """Returns whether a model of this name exists. The name must have passed `check_name`."""
    return (repository / name).is_dir() and _looks_like_model(repository / name)


def scan_model(folder: Path) -> ModelFiles | None:
    """Returns the model's files, or None if it does not exist. Skips versions that vanish during the scan."""
    if not _looks_like_model(folder):
        return None
    versions = {}
    for entry in _folders(folder):
        if number := _version(entry.name):
            stats = scan_version(Path(entry.path))
            if stats:
                versions[number] = stats
    return ModelFiles(_file_stats(folder, recursive=False), versions)


def scan_version(folder: Path) -> FileStats:
    """Returns the files of a version's folder, those of subfolders included; empty if it does not exist."""
    return _file_stats(folder, recursive=True)


def _version(name: str) -> int:
    """The version number, or 0 if the name is not one: no sign, no leading zeros, at most 18 digits."""
    return int(name) if name.isascii() and name.isdecimal() and not name.startswith("0") and len(name) < 19 else 0


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"} and len(name) < 256


def _looks_like_model(folder: Path) -> bool:
    return os.path.isfile(folder / "config.pbtxt") or any(_version(entry.name) for entry in _folders(folder))


def _folders(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Visible folders, including symbolic links to folders."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if _is_name(entry.name) and entry.is_dir())
    except OSError:
        return


def _file_stats(folder: Path, *, recursive: bool) -> FileStats:
    try:
        return tuple(sorted(_walk(folder, "", recursive)))
    except FileNotFoundError:
        return ()  # a file was removed during the scan: the next scan sees the result
    except OSError as error:
        return ((f"unreadable: {error.strerror}", 0, 0, 0),)  # loading reports the error


def _walk(folder: Path, prefix: str, recursive: bool) -> Iterator[tuple[str, int, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if recursive:
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", recursive)
            else:
                status = entry.stat()
                yield f"{prefix}{entry.name}", status.st_size, status.st_mtime_ns, status.st_ino
