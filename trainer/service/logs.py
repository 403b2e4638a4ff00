"""Reads the logs of a job's attempts, also while they grow."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.service.jobs import FINAL, Job

POLL_S = 0.2
_CHUNK_BYTES = 64 * 1024


def tail(path: Path, num_lines: int) -> int:
    """Returns where the last lines of a file begin, in bytes."""
    with path.open("rb") as file:
        size = position = file.seek(0, 2)
        content = b""
        while position > 0 and content.count(b"\n") <= num_lines:
            position = max(0, position - _CHUNK_BYTES)
            file.seek(position)
            content = file.read(size - position)
    lines = content.splitlines(keepends=True)
    return size - sum(map(len, lines[max(0, len(lines) - num_lines) :]))


def read(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yields the content of a file from `start` on, as far as it is there."""
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def follow(look: Callable[[], tuple[Job, Sequence[Path]]], num_lines: int | None) -> Iterator[bytes]:
    """Yields the newest attempt's log, and what is added, also by later attempts, until the job has ended.

    Yields empty bytes where there is nothing new.

    Args:
        look: returns the job and its logs.
        num_lines: of what is there, only the last ones.
    """
    job, paths = look()
    path = paths[-1] if paths else None
    position = tail(path, num_lines) if path is not None and num_lines is not None else 0
    while True:
        has_ended = job.state in FINAL  # before reading: nothing is written after it
        if path is not None:
            for chunk in read(path, position):
                position += len(chunk)
                yield chunk
        if paths and paths[-1] != path:
            path, position = paths[paths.index(path) + 1 if path in paths else 0], 0
            continue
        if has_ended:
            return
        yield b""  # the caller may want to stop
        time.sleep(POLL_S)
        job, paths = look()
