"""Files that are there whole or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".in-use"
LEAVING_S = 120.0
"""How long the user of a folder may take to leave it: a file server knows after 90 s that a host is gone (NFS)."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to the disk, rename. On any failure the old file stands and nothing else."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
def sole_user(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Within, no other process uses this folder in the same way; whoever comes second waits for a while.

    The kernel gives the folder back when the process dies. On file systems without locks nobody is kept out.

    Raises:
        TimeoutError: somebody else stays in it.
        OSError: it cannot be written.
    """
    with (folder / LOCK_FILE).open("ab") as file:  # closed, it is free
        if not _is_locked(file, wait_s=1.0):
            say(f"{folder} is in use by another process: waiting up to {LEAVING_S:.0f} s for it to leave")
            if not _is_locked(file, wait_s=LEAVING_S):
                raise TimeoutError(f"{folder} is in use by another process")
        yield


def _is_locked(file: IO[bytes], wait_s: float) -> bool:
    """Lock a file, as soon as nobody else has it, or in vain. Where there are no locks, as if nobody had."""
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            return True


def is_temporary(path: Path) -> bool:
    """Whether this is what a kill in the middle of `write_atomically` leaves."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically. ASCII, so that file names that are not UTF-8 survive too."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Add a line to the end of a file, flushed to the disk. On any failure the lines before it stand and nothing else.

    What a kill in the middle of this has left there is taken away.
    """
    with path.open("ab", buffering=0) as file:  # a buffer would try once more when it is closed
        end = path.read_bytes().rfind(b"\n") + 1
        try:
            file.truncate(end)
            left = memoryview(f"{line}\n".encode())
            while left:  # the last bytes of a disk are taken before it is said to be full
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


def read_lines(path: Path) -> list[str]:
    """The lines of `append_line`, without one that a kill has cut short; none where there is no file."""
    try:
        return [line.decode() for line in path.read_bytes().split(b"\n")[:-1]]
    except FileNotFoundError:
        return []


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder (a rename), survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
