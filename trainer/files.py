"""Files that are written completely or not at all, and locks."""

import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from convoy.named_files import only_regular, read_regular

MAX_NAME_BYTES = 255
"""The longest name of a file or folder that Linux's file systems take."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name, flushes to the disk and renames. A failure leaves the old file and nothing else."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextmanager
def locked(
    path: Path, log: Callable[[str], None], message: str, *, log_after_s: float = 1.0, timeout_s: float = math.inf
) -> Iterator[bool]:
    """Context that holds the lock file `path`, after any other process has released it.

    The kernel releases the lock when its holder dies. Yields whether the file system has locks; if it has none, other
    processes are not kept out.

    Args:
        message: the line to log, once, if this process has to wait for longer than `log_after_s`.

    Raises:
        TimeoutError: another process has held the lock for longer than `timeout_s` since then.
        OSError: the file cannot be written.
    """
    with open(path, "ab", opener=only_regular) as file:  # closing it releases the lock
        try:
            has_locks = _lock(file, log_after_s)
        except TimeoutError:
            log(message)
            has_locks = _lock(file, timeout_s)
        yield has_locks


def _lock(file: IO[bytes], timeout_s: float) -> bool:
    """Locks a file; returns False where the file system has no locks.

    Raises:
        TimeoutError: another process holds the lock.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(f"{file.name} is locked") from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            return False


def is_locked(path: Path) -> bool:
    """Returns whether another process holds the lock file `path` at this moment.

    False where the file, or the file system's locks, are missing.
    """
    try:
        with open(path, "rb", opener=only_regular) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def create_folder(parent: Path, name: str) -> Path:
    """Creates a folder that no other process has: `name`, or the first of `name-2`, `name-3`, … that does not exist.

    Raises:
        OSError: it cannot be created.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise AssertionError


def temporary_name(name: str) -> str:
    """Returns a name that this process alone uses and `is_temporary` knows; a long name is cut to fit a file system."""
    end = f".{os.getpid()}.tmp"
    return "." + os.fsdecode(os.fsencode(name)[: MAX_NAME_BYTES - len(end) - 1]) + end


def is_temporary(path: Path) -> bool:
    """Returns whether a process that was killed in `write_atomically` left this file."""
    return re.fullmatch(r"\..*\.\d+\.tmp", path.name, re.DOTALL) is not None


def remove_temporary(folder: Path) -> None:
    """Removes the files that killed processes left in `write_atomically`, from a folder where no other one writes."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if is_temporary(path):
                with suppress(OSError):
                    path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; in ASCII, so that file names that are not UTF-8 survive too."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Appends a JSON object as one line and flushes it to the disk. A failure leaves the lines before it.

    Removes an incomplete last line, which a killed process left.
    """
    with path.open("ab", buffering=0) as file:  # closing a buffer would repeat a failed write
        lines = _complete_lines(path.read_bytes())
        new = f"{line}\n" if lines.endswith(b"\n") or not lines else f"\n{line}\n"
        try:
            file.truncate(len(lines))
            left = memoryview(new.encode())
            while left:  # a disk that is nearly full accepts a part
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(len(lines))
            raise


def read_lines(path: Path) -> list[str]:
    """Returns the lines that `append_line` wrote, without an incomplete last one; none if there is no file."""
    try:
        lines = _complete_lines(read_regular(path)).decode()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return lines.removesuffix("\n").split("\n") if lines else []


def _complete_lines(content: bytes) -> bytes:
    """Returns all but an incomplete last line. A line without its newline, as some editors leave it, is complete."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])  # a part of an object is not JSON
    except ValueError:
        return content[:end]
    return content


def flush_to_disk(path: Path) -> None:
    """Makes the content of a file, or the names in a folder after a rename, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb", opener=only_regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(value: Any, file: BinaryIO) -> None:
    """Calls `torch.save`, but raises the file's own error, where torch's C++ writer would hide it.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    writer = _ErrorKeepingWriter(file)
    import torch  # takes seconds, and only this function needs it

    torch.save(value, cast(IO[bytes], writer))
    if writer.error is not None:
        raise writer.error


class _ErrorKeepingWriter:
    """Keeps the first write error: raised inside torch's C++ writer it would end the process."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Does nothing: torch.save needs the method, and the caller flushes its file."""
