"""Files that are there whole or not at all."""

import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch


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
def locked(
    path: Path, say: Callable[[str], None], waiting: str, *, told_after_s: float = 1.0, patience_s: float = math.inf
) -> Iterator[bool]:
    """Within, no other process holds the lock `path`; whoever comes second says `waiting`, once, and waits.

    The kernel gives the lock back when the process dies. On file systems without locks nobody is kept out; yields
    whether anybody is.

    Raises:
        TimeoutError: somebody else holds it for longer than `patience_s`.
        OSError: it cannot be written.
    """
    with path.open("ab") as file:  # closed, it is free
        try:
            keeps_out = _lock(file, told_after_s)
        except TimeoutError:
            say(waiting)
            keeps_out = _lock(file, patience_s)
        yield keeps_out


def _lock(file: IO[bytes], wait_s: float) -> bool:
    """Lock a file as soon as nobody else has it; in vain, it is a TimeoutError. False where there are no locks."""
    until = time.monotonic() + wait_s
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


def is_temporary(path: Path) -> bool:
    """Whether this is what a kill in the middle of `write_atomically` leaves."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically. ASCII, so that file names that are not UTF-8 survive too."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Add a line, a JSON object, to a file, flushed to the disk. On any failure the lines before it stand alone.

    What a kill in the middle of this has left there is taken away.
    """
    with path.open("ab", buffering=0) as file:  # a buffer would try once more when it is closed
        lines = _whole_lines(path.read_bytes())
        new = f"{line}\n" if lines.endswith(b"\n") or not lines else f"\n{line}\n"
        try:
            file.truncate(len(lines))
            left = memoryview(new.encode())
            while left:  # the last bytes of a disk are taken before it is said to be full
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(len(lines))
            raise


def read_lines(path: Path) -> list[str]:
    """The lines of `append_line`, without one that a kill has cut short; none where there is no file."""
    try:
        lines = _whole_lines(path.read_bytes()).decode()
    except FileNotFoundError:
        return []
    return lines.removesuffix("\n").split("\n") if lines else []


def _whole_lines(content: bytes) -> bytes:
    """All but a line that a kill has cut short. One that lacks only its newline, as some editors leave it, is whole."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])  # no beginning of an object is JSON
    except ValueError:
        return content[:end]
    return content


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


def save_tensors(value: Any, file: BinaryIO) -> None:
    """`torch.save`, but a failure is the file's own (the disk is full), and not what torch's C++ writer makes of it.

    Raises:
        OSError: the file cannot be written.
    """
    sink = _Sink(file)
    torch.save(value, cast(IO[bytes], sink))
    if sink.error is not None:
        raise sink.error


class _Sink:
    """Keeps the first write error for later: raised inside torch's C++ writer it would end the process."""

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
        """torch.save asks for it; the file is flushed by whoever opened it."""
