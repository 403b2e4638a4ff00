"""Reads files that a command line names: none of them can make the command wait for ever."""

import errno
import os
import stat
from pathlib import Path


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
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
