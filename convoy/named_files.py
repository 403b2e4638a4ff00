"""Reads files that a command line names, or that are in folders that it names: none makes the command wait for ever."""

import errno
import os
import stat
from pathlib import Path

_NO_REGULAR_FILE = "it is no regular file"


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file, or of a pipe into which another process writes, as in `--config <(command)`.

    Raises:
        OSError: it cannot be read, it is a device, or a pipe that nobody writes to, for which `open` would wait.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not file.isatty()):
            raise OSError(errno.EINVAL, "it is a device, not a file", os.fspath(path))
        os.set_blocking(file.fileno(), True)
        content = file.read()
    if stat.S_ISFIFO(mode) and not content:
        raise OSError(errno.ENODATA, "it is a pipe that nobody writes to", os.fspath(path))
    return content


def only_regular(name: str, flags: int) -> int:
    """Opens a file for `open`, as its `opener`: for the files of ours in a folder.

    Raises:
        OSError: it cannot be opened, or a pipe or a device is in its place, which may never end.
    """
    file = os.open(name, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(file).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # `open` has an error of its own for a folder
        os.close(file)
        raise OSError(errno.EINVAL, _NO_REGULAR_FILE, name)
    return file


def read_regular(path: Path) -> bytes:
    """Returns the content of a file of ours. Raises OSError as `only_regular` does."""
    with open(path, "rb", opener=only_regular) as file:
        return file.read()


def check_regular(path: Path) -> None:
    """Checks that a path, if anything is there, leads to a regular file.

    Raises:
        OSError: it does not, or nobody can tell.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, _NO_REGULAR_FILE, os.fspath(path))
