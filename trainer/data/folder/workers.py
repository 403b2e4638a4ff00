"""Reads many image files in threads, because Pillow releases the GIL, and collects errors and warnings by file."""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from convoy.cpus import num_available_cpus
from convoy.images import ImageError
from convoy.printable import printable
from trainer.errors import list_names

_MAX_THREADS = 8
_AHEAD = 16
"""Files for each thread that wait for it: a folder may have millions, and a queue of all would fill the memory."""

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
    work: Callable[[int, Path], T], paths: Iterable[Path], max_threads: int = _MAX_THREADS
) -> Iterator[T | ImageProblem]:
    """Yields `work(number, path)` for each path, in order; an ImageProblem in place of an ImageError."""

    def run(number: int, path: Path) -> T | ImageProblem:
        _current_file.path = path
        try:
            return work(number, path)
        except ImageError as error:
            return ImageProblem(path, str(error))

    num_threads = max(1, min(num_available_cpus(), _MAX_THREADS, max_threads))
    waiting: deque[Future[T | ImageProblem]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for number, path in enumerate(paths):
                waiting.append(pool.submit(run, number, path))
                if len(waiting) > _AHEAD * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the caller may stop early
            for future in waiting:
                future.cancel()


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


def ignore_warnings() -> None:
    """Ignores warnings about images in this process, for good: threads cannot do so for a while."""
    from PIL.Image import DecompressionBombWarning

    warnings.filterwarnings("ignore", module=r"(PIL|convoy|trainer\.data)\.")
    warnings.simplefilter("ignore", DecompressionBombWarning)


def list_some(problems: Sequence[ImageProblem]) -> str:
    """Returns the first few problems as a part of a line."""
    return list_names([f"{printable(str(problem.path))} ({problem.reason})" for problem in problems])
