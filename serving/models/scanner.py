"""Scans a model repository: which models and versions exist, and whether their files changed. Reads no contents.

What cannot be looked at is not taken for absent: the scan raises OSError, or lists it as unreadable.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convoy.promotion import PROMOTION_FILE
from serving.errors import InvalidArgument, StartupError, quote
from serving.models.config import CONFIG_FILE
from serving.models.files import check_link, describe

logger = logging.getLogger(__name__)

FileStats = tuple[tuple[str, int, int, int], ...]
"""Path, size in bytes, modification time in ns and inode of each file. Differs whenever a file may have changed."""

_LINK_TO_NOTHING = -1
"""The size of a link to nothing in `FileStats`."""

_SYSTEM_FOLDERS = frozenset({"lost+found", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
_TEMPORARY = re.compile(r"\..*|.*~|~\$.*|#.*#|.*\.(swp|tmp|part|crdownload)|4913|Thumbs\.db|desktop\.ini", re.I | re.S)
"""Hidden files, and those that editors, copying programs and file managers leave for a while. Vim writes 4913."""


WARMUP_FOLDER = "warmup"
"""Of a model: files beside the versions, for `input_data_file` of the configuration's `model_warmup`."""


@dataclass(frozen=True, slots=True)
class RepositoryFolders:
    """The folders of a repository, as one scan found them.

    Args:
        models: names of the folders that hold a configuration or a version, sorted.
        unreadable: why each other folder could not be read, by name: it may be a model.
        device: number of the file system that the repository is on.
    """

    models: tuple[str, ...]
    unreadable: dict[str, str]
    device: int


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model, as one scan found them.

    Args:
        own: the files beside the versions that these are loaded from: configuration, labels, data of
            the warm-up.
        versions: the files of each version.
        unreadable: why each other version could not be read, by number.
        device: number of the file system that the model is on.
    """

    own: FileStats
    versions: dict[int, FileStats]
    unreadable: dict[int, str]
    device: int


def check_repository(path: Path) -> RepositoryFolders:
    """Checks that a folder can be a model repository, and returns its folders. Warns of those that cannot be read.

    Raises:
        StartupError: the folder does not exist, cannot be read, or is a single model.
    """
    try:
        folders = scan_repository(path)
        is_model = not folders.models and _looks_like_model(path)
    except FileNotFoundError as error:
        raise StartupError(
            f"there is no model repository {path}: give the folder to which trainings export, models/ by default"
        ) from error
    except NotADirectoryError as error:
        raise StartupError(f"the model repository {path} is not a folder") from error
    except OSError as error:
        raise StartupError(f"the model repository {path} cannot be read: {describe(error)}") from error
    for name, reason in folders.unreadable.items():
        logger.warning("%s cannot be read, so that it is not known whether it is a model: %s", path / name, reason)
    if is_model:
        raise StartupError(f"{path} is a model, not a repository of models: use its parent folder")
    return folders


def check_name(name: str) -> None:
    """Checks that a name can only refer to a direct, visible child of the repository. Checks nothing else.

    Raises:
        InvalidArgument: the name is empty, hidden or could be a path.
    """
    if not _is_name(name):
        raise InvalidArgument(f"{quote(name)} is not a valid model name")


def scan_repository(path: Path) -> RepositoryFolders:
    """Returns the models of a repository. Skips links to nothing.

    Raises:
        OSError: the repository itself cannot be read, or is gone.
    """
    models: list[str] = []
    unreadable: dict[str, str] = {}
    for entry in _entries(path):
        if _is_name(entry.name) and entry.name not in _SYSTEM_FOLDERS:
            try:
                if _kind(entry) == "folder" and _looks_like_model(Path(entry.path)):
                    models.append(entry.name)
            except FileNotFoundError:
                pass  # removed during the scan
            except OSError as error:
                unreadable[entry.name] = describe(error)
    return RepositoryFolders(tuple(sorted(models)), dict(sorted(unreadable.items())), os.stat(path).st_dev)


def has_model(repository: Path, name: str) -> bool:
    """Returns whether a model of this name exists. The name must have passed `check_name`.

    Raises:
        OSError: that is unknown, because the folder or the repository cannot be read.
    """
    try:
        return _looks_like_model(repository / name)
    except (FileNotFoundError, NotADirectoryError):
        check_link(repository / name)
        os.stat(repository)
        return False


def scan_model(folder: Path) -> ModelFiles | None:
    """Returns the model's files, or None if its folder is gone. Skips versions that vanish during the scan.

    Raises:
        OSError: the folder or a file beside the versions cannot be looked at; or the repository is gone as well.
    """
    own: list[tuple[str, int, int, int]] = []
    versions: dict[int, FileStats] = {}
    unreadable: dict[int, str] = {}
    try:
        entries = _entries(folder)
        device = os.stat(folder).st_dev
    except (FileNotFoundError, NotADirectoryError):
        check_link(folder)
        os.stat(folder.parent)
        return None
    for entry in entries:
        if number := version_number(entry.name):
            try:
                if stats := _version_stats(entry):
                    versions[number] = stats
            except OSError as error:
                unreadable[number] = describe(error)
        elif entry.name == WARMUP_FOLDER and _kind(entry) == "folder":
            own += _walk(Path(entry.path), f"{WARMUP_FOLDER}/", set())
        elif not _TEMPORARY.fullmatch(entry.name) and entry.name != PROMOTION_FILE and _kind(entry) != "folder":
            own += _file_stats(entry, "")
    return ModelFiles(tuple(sorted(own)), versions, unreadable, device)


def scan_version(folder: Path) -> FileStats:
    """Returns the files of a version's folder, those of subfolders included; empty if the folder is gone.

    Links to nothing are listed as such. Hidden and temporary files are left out.

    Raises:
        OSError: a file or folder cannot be looked at.
    """
    try:
        return tuple(sorted(_walk(folder, "", set())))
    except FileNotFoundError:
        return ()


def version_number(name: str) -> int:
    """Returns the version number, or 0 if the name is not one: no sign, no leading zeros, at most 18 digits."""
    return int(name) if name.isascii() and name.isdecimal() and not name.startswith("0") and len(name) < 19 else 0


def is_plain_name(name: str) -> bool:
    """Returns whether a file or folder of this name may belong to a model: visible, not temporary, and no path."""
    return _is_name(name) and name not in _SYSTEM_FOLDERS and not _TEMPORARY.fullmatch(name)


def _is_name(name: str) -> bool:
    """Returns whether a name is visible, no path, and UTF-8, as the protocol requires."""
    return (
        bool(name)
        and not name.startswith(".")
        and not set(name) & {"/", "\\", "\0"}
        and len(name) < 256
        and not any("\ud800" <= character <= "\udfff" for character in name)
    )


def _looks_like_model(folder: Path) -> bool:
    for entry in _entries(folder):
        kind = _kind(entry)
        if (entry.name == CONFIG_FILE and kind != "folder") or (version_number(entry.name) and kind != "file"):
            return True
    return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "file", "nothing"]:
    """Returns what an entry is, or what a link leads to."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_symlink():
            entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return "nothing"
        raise
    return "file"


def _version_stats(entry: os.DirEntry[str]) -> FileStats:
    kind = _kind(entry)
    if kind == "nothing":
        raise OSError(errno.ENOENT, "a link to nothing")
    return scan_version(Path(entry.path)) if kind == "folder" else ()


def _walk(folder: Path, prefix: str, visited: set[tuple[int, int]]) -> Iterator[tuple[str, int, int, int]]:
    """Visits each folder once: links may lead back to a folder above."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for entry in _entries(folder):
        if _TEMPORARY.fullmatch(entry.name) or entry.name in _SYSTEM_FOLDERS:
            continue
        if _kind(entry) == "folder":
            with suppress(FileNotFoundError):  # removed during the scan
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", visited)
        else:
            yield from _file_stats(entry, prefix)


def _file_stats(entry: os.DirEntry[str], prefix: str) -> FileStats:
    """Returns the line of one file; none if it was removed during the scan."""
    try:
        if _kind(entry) == "nothing":
            status, size = entry.stat(follow_symlinks=False), _LINK_TO_NOTHING
        else:
            status = entry.stat()
            size = status.st_size
    except FileNotFoundError:
        return ()
    return ((f"{prefix}{entry.name}", size, status.st_mtime_ns, status.st_ino),)
