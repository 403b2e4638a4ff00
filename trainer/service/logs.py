"""Reads the logs of a job's attempts, also while they grow, whole or the lines of one rank.

Where a job has several ranks, torchrun begins each line of a rank with `[rank N] `; its own lines have no such prefix.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.errors import ConfigError
from trainer.service.jobs import FINAL, Job, JobSpec

POLL_S = 0.2
_CHUNK_BYTES = 64 * 1024
RANK_PREFIX = "[rank ${rank}] "
"""As a template of torchrun, which puts the number in."""


def rank_logging(spec: JobSpec, folder: Path) -> dict[str, str]:
    """Returns variables for torchrun that have it begin the lines of each rank with `RANK_PREFIX`.

    Args:
        folder: in which torchrun keeps what each rank has written to its output and its errors, in a file each.
    """
    if spec.max_ranks == 1:
        return {}
    return {
        "PET_LOG_DIR": str(folder),
        "PET_TEE": "3",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": RANK_PREFIX,
        "PYTHONUNBUFFERED": "1",  # torchrun passes the lines on at once
    }


def prefix_of(rank: int | None, spec: JobSpec) -> bytes:
    """Returns how the wanted lines of a job's log begin; empty for all lines.

    Raises:
        ConfigError: the job has no such rank.
    """
    if rank is None:
        return b""
    if rank >= spec.max_ranks:
        last = spec.max_ranks - 1
        raise ConfigError(f"rank {rank}: the job has " + (f"the ranks 0 to {last}" if last else "the rank 0 only"))
    return RANK_PREFIX.replace("${rank}", str(rank)).encode() if spec.max_ranks > 1 else b""


def tail(path: Path, num_lines: int, prefix: bytes = b"") -> int:
    """Returns where the last lines of a file, that begin with `prefix`, begin, in bytes."""
    if prefix:
        return _tail_of_rank(path, num_lines, prefix)
    with path.open("rb") as file:
        size = position = file.seek(0, 2)
        content = b""
        while position > 0 and content.count(b"\n") <= num_lines:
            position = max(0, position - _CHUNK_BYTES)
            file.seek(position)
            content = file.read(size - position)
    lines = content.splitlines(keepends=True)
    return size - sum(map(len, lines[max(0, len(lines) - num_lines) :]))


def _tail_of_rank(path: Path, num_lines: int, prefix: bytes) -> int:
    position, found = 0, deque[int](maxlen=num_lines)
    with path.open("rb") as file:
        for line in file:
            if line.startswith(prefix):
                found.append(position)
            position += len(line)
    return found[0] if found else position


def read(path: Path, num_lines: int | None = None, prefix: bytes = b"") -> Iterator[bytes]:
    """Yields the content of a log, as far as it is there.

    Args:
        num_lines: only the last ones; None for all.
        prefix: only lines that begin with it, without it.
    """
    wanted = _Wanted(prefix)
    for chunk in _chunks(path, 0 if num_lines is None else tail(path, num_lines, prefix)):
        yield wanted.of(chunk)
    yield wanted.rest()


def follow(
    look: Callable[[], tuple[Job, Sequence[Path]]], num_lines: int | None, prefix: bytes = b""
) -> Iterator[bytes]:
    """Yields the newest attempt's log, and what is added, also by later attempts, until the job has ended.

    Yields empty bytes where there is nothing new.

    Args:
        look: returns the job and its logs.
        num_lines: of what is there, only the last ones.
        prefix: only lines that begin with it, without it.
    """
    job, paths = look()
    path, wanted = paths[-1] if paths else None, _Wanted(prefix)
    position = tail(path, num_lines, prefix) if path is not None and num_lines is not None else 0
    while True:
        has_ended = job.state in FINAL  # before reading: nothing is written after it
        if path is not None:
            for chunk in _chunks(path, position):
                position += len(chunk)
                yield wanted.of(chunk)
        if paths and paths[-1] != path:
            yield wanted.rest()
            path, position = paths[paths.index(path) + 1 if path in paths else 0], 0
            continue
        if has_ended:
            yield wanted.rest()
            return
        yield b""  # the caller may want to stop
        time.sleep(POLL_S)
        job, paths = look()


def _chunks(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


class _Wanted:
    """The lines that begin with a prefix, of content that arrives in chunks; all of it if the prefix is empty."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._unfinished = b""

    def of(self, chunk: bytes) -> bytes:
        """Returns the wanted part of the lines that a chunk completes."""
        if not self._prefix:
            return chunk
        *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
        return b"".join(line.removeprefix(self._prefix) + b"\n" for line in lines if line.startswith(self._prefix))

    def rest(self) -> bytes:
        """Returns the last line if it has no end and is wanted."""
        return self.of(b"\n") if self._unfinished else b""
