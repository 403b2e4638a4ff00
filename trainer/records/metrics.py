"""Reads a run's `metrics.jsonl`, which `trainer.sinks` writes."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convoy.named_files import only_regular, read_regular

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl` without those that are none, such as one that a kill cut short."""
    try:
        lines = read_regular(folder / METRICS_FILE).splitlines()
    except FileNotFoundError:
        return []
    return [line for line in map(_parse, lines) if line is not None]


@dataclass(frozen=True, slots=True)
class NewMetrics:
    """What a run has written since a reader's last look.

    Args:
        lines: without those that are no metrics.
        offset: bytes of the file that have been read.
        inode: of the file.
        is_anew: whether the file is another one, or shorter, and the lines are its first.
    """

    lines: list[dict[str, Any]]
    offset: int
    inode: int
    is_anew: bool


def read_new_metrics(folder: Path, offset: int, inode: int | None = None) -> NewMetrics:
    """Reads a run's metrics while the run writes them, up to a last line that is half-written.

    A run that continues from a checkpoint writes the file anew.

    Args:
        offset: bytes that have been read before.
        inode: of the file that was read before; None if the reader does not know it.

    Raises:
        OSError: there is no file yet, or it cannot be read.
    """
    with open(folder / METRICS_FILE, "rb", opener=only_regular) as file:
        status = os.fstat(file.fileno())
        is_anew = status.st_size < offset or inode not in (None, status.st_ino)
        start = 0 if is_anew else offset
        file.seek(start)
        content = file.read()
    end = content.rfind(b"\n") + 1
    lines = [line for line in map(_parse, content[:end].splitlines()) if line is not None]
    return NewMetrics(lines, start + end, status.st_ino, is_anew)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line, parse_constant=lambda _: None, parse_float=_finite)  # JSON has no NaN and no infinity
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return None
    return value if all(isinstance(value.get(name), int) for name in ("step", "epoch")) else None
