"""Unfinished files: a folder for them, a lock for the process that writes them, and one-line errors of the disk."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from trainer.errors import ConfigError, DataError
from trainer.files import locked, remove_temporary

TEMPORARY_PREFIX = ".tmp-"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
"""ENOENT: the kernel's answer where folders cannot be made, as in /proc."""


def file_lock(path: Path, log: Callable[[str], None], *, log_after_s: float = 3.0) -> AbstractContextManager[bool]:
    """Returns a context that one process of this machine enters at a time; the others wait for as long as it takes.

    Args:
        path: the lock file; its folder is made where it is missing.
        log: receives a line if this process has to wait.
        log_after_s: time to wait before that line.

    Returns:
        A context manager that yields whether the lock excludes others: False on a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for another process that is preparing {path.stem}"
    return locked(path, log, waiting, log_after_s=log_after_s)


@contextmanager
def exclusive_folder(folder: Path, lock_path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Makes a context in which this process alone of this machine writes in `folder`; the others wait.

    The folder is made where it is missing, without the unfinished files of killed processes, and removed at the end if
    nothing is in it. The lock file stays: to remove one for which others wait would let two of them in.

    Args:
        folder: for files that are made once.
        lock_path: the lock file, outside of the folder.
        log: receives a line if this process has to wait.

    Raises:
        DataError: the disk is full.
        ConfigError: the folder cannot be written.
    """
    with explain_disk_errors(folder), file_lock(lock_path, log) as excludes_others:
        folder.mkdir(parents=True, exist_ok=True)
        if excludes_others:
            remove_stale(folder)
        try:
            yield
        finally:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Makes a new folder for unfinished files inside `parent`, and removes it at the end of the context."""
    folder = parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir()  # not tempfile's 0700: users may share a cache, and the umask decides
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(parent: Path) -> None:
    """Removes the unfinished files of killed processes in `parent`; call it only while holding the lock."""
    for leftover in parent.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove_temporary(parent)


@contextmanager
def explain_disk_errors(folder: Path, required_bytes: int | None = None) -> Iterator[None]:
    """Turns errors of the disk inside the context into one line for the user.

    Args:
        folder: the folder in which the context writes.
        required_bytes: bytes that it writes, where known.

    Raises:
        DataError: the disk is full.
        ConfigError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            need = f"about {required_bytes / 1e6:.1f} MB are needed" if required_bytes else "more room is needed"
            raise DataError(f"disk full: {need} in {folder}, {_free_megabytes(folder)} are free") from error
        if error.errno in _NOT_ALLOWED:
            raise ConfigError(f"cannot write in {folder}: {error.strerror}; choose another --data-dir") from error
        raise


def _free_megabytes(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f} MB"
