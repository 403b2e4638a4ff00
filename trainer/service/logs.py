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


def written(paths: Sequence[Path]) -> list[Path]:
    """Returns the logs that are there: an attempt may have ended before it wrote one."""
    return [path for path in paths if path.exists()]


def tail(path: Path, num_lines: int, prefix: bytes = b"") -> int:
    """Returns where the last lines of a file, that begin with `prefix`, begin, in bytes."""
    if prefix:
        return _tail_of_rank(path, num_lines, prefix)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if num_lines == 0:
            return size
        for end in range(size, 0, -_CHUNK_BYTES):
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            chunk = file.read(end - start)
            position = len(chunk) - (end == size)  # the end of the last line begins no line
            while (position := chunk.rfind(b"\n", 0, position)) >= 0:
                num_lines -= 1
                if num_lines == 0:
                    return start + position + 1
    return 0


def _tail_of_rank(path: Path, num_lines: int, prefix: bytes) -> int:
    position, is_start, found = 0, True, deque[int](maxlen=num_lines)
    with path.open("rb") as file:
        while part := file.readline(_CHUNK_BYTES):  # of a line of any length
            if is_start and part.startswith(prefix):
                found.append(position)
            position += len(part)
            is_start = part.endswith(b"\n")
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
        look: returns the job and the log of each attempt.
        num_lines: of what is there, only the last ones.
        prefix: only lines that begin with it, without it.
    """
    job, paths = look()
    paths = written(paths)
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
        paths = written(paths)


def _chunks(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


class _Wanted:
    """The lines that begin with a prefix, of content that arrives in chunks; all of it if the prefix is empty."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._undecided = b""  # the begin of a line, shorter than the prefix
        self._is_wanted: bool | None = None  # the line whose begin has been seen

    def of(self, chunk: bytes) -> bytes:
        """Returns the wanted part of what a chunk adds. A line may have any length: none is kept in memory."""
        if not self._prefix:
            return chunk
        *lines, last = (self._undecided + chunk).split(b"\n")
        self._undecided = b""
        found = []
        for line in lines:
            found += self._part(line + b"\n")
            self._is_wanted = None
        if self._is_wanted is None and len(last) < len(self._prefix):
            self._undecided = last
        else:
            found += self._part(last)
        return b"".join(found)

    def _part(self, part: bytes) -> list[bytes]:
        """Returns a part of a line, without the prefix at the line's begin, if it is wanted."""
        if self._is_wanted is None:
            self._is_wanted = part.startswith(self._prefix)
            part = part.removeprefix(self._prefix)
        return [part] if self._is_wanted else []

    def rest(self) -> bytes:
        """Ends the last line, which may have no end."""
        has_begun, self._undecided = self._is_wanted, b""
        self._is_wanted = None
        return b"\n" if has_begun else b""
