"""Reads many image files in threads, because Pillow releases the GIL, and collects errors and warnings by file."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from convoy.cpus import num_available_cpus
from convoy.images import ImageError

_MAX_THREADS = 8
_NUM_LISTED = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageProblem:
    """The reason why a file cannot be read, or a warning about it."""

    path: Path
    reason: str


class _CurrentFile(threading.local):
    path = Path()
    """The file that this thread reads."""


_current_file = _CurrentFile()


def map_in_threads(
    work: Callable[[int, Path], T], paths: Sequence[Path], max_threads: int = _MAX_THREADS
) -> Iterator[T | ImageProblem]:
    """Yields `work(index, path)` for each path, in order; an ImageProblem in place of an ImageError."""

    def run(index: int, path: Path) -> T | ImageProblem:
        _current_file.path = path
        try:
            return work(index, path)
        except ImageError as error:
            return ImageProblem(path, str(error))

    with ThreadPoolExecutor(max(1, min(num_available_cpus(), _MAX_THREADS, max_threads))) as pool:
        yield from pool.map(run, range(len(paths)), paths)  # cancels what has not started if the caller stops early


@contextmanager
def collect_warnings() -> Iterator[dict[Path, ImageProblem]]:
    """Collects the first warning about each file; Pillow itself does not name the file."""
    from PIL.Image import DecompressionBombWarning

    collected: dict[Path, ImageProblem] = {}

    def collect(message: Warning | str, *_: Any, **__: Any) -> None:
        path = _current_file.path
        collected.setdefault(path, ImageProblem(path, " ".join(str(message).split())))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"(PIL|convoy|trainer\.data)\.")
        # From half of the size at which Pillow refuses an image: photographs are as large.
        warnings.simplefilter("ignore", DecompressionBombWarning)
        warnings.showwarning = collect
        yield collected


def list_some(problems: Sequence[ImageProblem]) -> str:
    """Returns the first few problems as a part of a line."""
    listed = ", ".join(f"{problem.path} ({problem.reason})" for problem in problems[:_NUM_LISTED])
    return listed + (f" and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else "")
