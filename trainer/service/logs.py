"""Reads the logs of a job's attempts, also while they grow, whole or the lines of one rank.

Where a job has several ranks, torchrun begins each line of a rank with `[rank N] `; its own lines have no such prefix.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from trainer.errors import ConfigError
from trainer.service import log_limit
from trainer.service.jobs import FINAL, Job, JobSpec

POLL_S = 0.2
_CHUNK_BYTES = 64 * 1024
RANK_PREFIX = "[rank ${rank}] "
"""As a template of torchrun, which puts the number in."""


class Position(NamedTuple):
    """A place in the logs of a job.

    Args:
        attempt: counted from 1.
        offset: bytes of its log before the place.
    """

    attempt: int
    offset: int


class LogChunk(NamedTuple):
    """A piece of a log.

    Args:
        end: where the log goes on behind it.
    """

    content: bytes
    end: Position


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


def written(paths: Sequence[Path]) -> list[int]:
    """Returns the attempts whose logs are there: one may have ended before it wrote one."""
    return [attempt for attempt, path in enumerate(paths, 1) if path.exists()]


def tail(path: Path, num_lines: int, prefix: bytes = b"") -> int:
    """Returns where the last lines of a file, that begin with `prefix`, begin, in bytes."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if num_lines == 0:
            return size
        if prefix:
            return _tail_of_rank(file, num_lines, prefix)
        return _lines_before(file, size - 1, num_lines)  # the end of the last line begins no line


def read(path: Path, start: Position, prefix: bytes = b"") -> Iterator[LogChunk]:
    """Yields the content of a log, as far as it is there.

    Args:
        start: in the attempt of this log.
        prefix: only lines that begin with it, without it.
    """
    wanted = _Wanted.at(path, start.offset, prefix)
    for content, offset in _chunks(path, start.offset):
        start = Position(start.attempt, offset)
        yield LogChunk(wanted.of(content), start)
    yield LogChunk(wanted.rest(), start)


def follow(
    read_job: Callable[[], tuple[Job, Sequence[Path]]], start: Position, prefix: bytes = b""
) -> Iterator[LogChunk]:
    """Yields an attempt's log, and what is added, also by later attempts, until the job has ended.

    Yields empty chunks where there is nothing new.

    Args:
        read_job: returns the job and the log of each attempt.
        prefix: only lines that begin with it, without it.
    """
    attempt, offset = start
    job, paths = read_job()
    wanted = _Wanted.at(path, offset, prefix) if (path := _path(paths, attempt)) else _Wanted(prefix)
    while True:
        has_ended = job.state in FINAL  # before reading: nothing is written after it
        if path := _path(paths, attempt):
            for content, end in _chunks(path, offset):
                offset = end
                yield LogChunk(wanted.of(content), Position(attempt, offset))
        later = next((number for number in written(paths) if number > attempt), None)
        if later or has_ended:
            attempt, offset = later or attempt + 1, 0
            yield LogChunk(wanted.rest(), Position(attempt, offset))
            if not later:
                return
            continue
        yield LogChunk(b"", Position(attempt, offset))  # the caller may want to stop
        time.sleep(POLL_S)
        job, paths = read_job()


def _path(paths: Sequence[Path], attempt: int) -> Path | None:
    return paths[attempt - 1] if attempt in written(paths) else None


def _chunks(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Yields the content of a log from a position on, in pieces, each with the position behind it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:  # somebody has deleted the job
        return
    with file:
        while True:
            length = _CHUNK_BYTES
            if offset < log_limit.FIRST_BYTES:
                length = min(length, log_limit.FIRST_BYTES - offset)
            elif (note := log_limit.read_note(file.fileno())) and offset < note[1]:
                yield note
                offset = note[1]
            file.seek(offset)
            if not (content := file.read(length)):
                return
            offset += len(content)
            yield content, offset


def _spans(file: BinaryIO) -> list[tuple[int, int]]:
    """Returns the parts of a log that are there."""
    size = file.seek(0, 2)
    note = log_limit.read_note(file.fileno())
    return [(0, size)] if note is None else [(0, log_limit.FIRST_BYTES), (note[1], size)]


def _lines_before(file: BinaryIO, end: int, num_lines: int) -> int:
    """Returns where the last of the lines begin whose begin lies before `end`, or at it."""
    for start, stop in reversed(_spans(file)):
        stop = min(stop, end)
        while stop > start:
            begin = max(start, stop - _CHUNK_BYTES)
            file.seek(begin)
            content = file.read(stop - begin)
            position = len(content)
            while (position := content.rfind(b"\n", 0, position)) >= 0:
                num_lines -= 1
                if num_lines == 0:
                    return begin + position + 1
            stop = begin
    return 0


def _tail_of_rank(file: BinaryIO, num_lines: int, prefix: bytes) -> int:
    position, found = 0, deque[int](maxlen=num_lines)
    for position, stop in _spans(file):
        file.seek(position)
        is_start = True
        while part := file.readline(min(_CHUNK_BYTES, stop - position)):  # of a line of any length
            if is_start and part.startswith(prefix):
                found.append(position)
            position += len(part)
            is_start = part.endswith(b"\n")
    return found[0] if found else position


class _Wanted:
    """The lines that begin with a prefix, of content that arrives in pieces; all of it if the prefix is empty."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._undecided = b""  # the begin of a line, shorter than the prefix
        self._is_wanted: bool | None = None  # the line whose begin has been seen

    @classmethod
    def at(cls, path: Path, offset: int, prefix: bytes) -> Self:
        """Returns those of a log from a position on, which may be within a line."""
        wanted = cls(prefix)
        if prefix and offset:
            with path.open("rb") as file:
                start = _lines_before(file, offset, 1)
            for content, end in _chunks(path, start):
                if end >= offset:
                    wanted.of(content[: max(0, len(content) - (end - offset))])
                    break
                wanted.of(content)
        return wanted

    def of(self, content: bytes) -> bytes:
        """Returns the wanted part of what a piece adds. A line may have any length: none is kept in memory."""
        content = content.replace(b"\0", b"")  # of a part that was freed while it was read
        if not self._prefix:
            return content
        *lines, last = (self._undecided + content).split(b"\n")
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
            self._is_wanted = part.startswith((self._prefix, log_limit.MARK))
            part = part.removeprefix(self._prefix)
        return [part] if self._is_wanted else []

    def rest(self) -> bytes:
        """Ends the last line, which may have no end."""
        has_begun, self._undecided = self._is_wanted, b""
        self._is_wanted = None
        return b"\n" if has_begun else b""
