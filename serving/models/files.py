"""Looks at the file system with three answers: there, gone, or unknown.

`Path.exists`, `is_file` and `is_dir` say "no" of a file that cannot be looked at, because of its permissions, a disk
error or a dead network mount. Here such a file is unknown, an OSError: only what is gone for certain is absent.
"""

import codecs
import errno
import os
import stat
from pathlib import Path

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_file(path: Path) -> bool:
    """Returns whether a file exists.

    Raises:
        OSError: it is unknown; or the path is a link to nothing.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        check_link(path)
        return False


def read_bytes(path: Path) -> bytes | None:
    """Returns a file's content; None if there is no such file.

    Raises:
        OSError: the file cannot be read; or the path is a link to nothing.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        check_link(path)
        return None


def read_text(path: Path) -> str | None:
    r"""Returns a file's text, with `\n` between lines; None if there is no such file.

    Editors of other systems write byte order marks, UTF-16, and other ends of lines.

    Raises:
        OSError: the file cannot be read; or the path is a link to nothing.
        ValueError: the file is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    data = read_bytes(path)
    if data is None:
        return None
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is neither UTF-8 nor UTF-16 with a byte order mark: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_link(path: Path) -> None:
    """Checks that a path that leads to nothing is no link: whoever made the link expects something there.

    Raises:
        OSError: it is a link; or that is unknown.
    """
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if is_link:
        raise OSError(errno.ENOENT, "a link to nothing")


def describe(error: OSError) -> str:
    """Returns why a file cannot be read, for a message that names the file."""
    return error.strerror or str(error) or type(error).__name__
