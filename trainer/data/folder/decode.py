"""Decodes image files of any format and size into one uint8 tensor.

`convoy.images` prepares each image. Threads decode, because Pillow releases the GIL.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from convoy.cpus import available_memory, num_available_cpus
from convoy.images import ImageError, explain_decode_errors, read_image
from trainer.errors import ConfigError, DataError
from trainer.files import sha256_of_file

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}
_MAX_THREADS = 8
_NUM_LISTED = 3

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _ImageProblem:
    """Why a file cannot be read, or what Pillow warns of in it."""

    path: Path
    reason: str


def probe_images(paths: list[Path], *, size_given: bool) -> tuple[int, int]:
    """Reads the header of every image.

    Images that cannot be opened are left for `decode_images` to report.

    Args:
        paths: image files.
        size_given: whether the images will be resized. Otherwise they must be squares of one size.

    Returns:
        The number of channels, 1 if all images are grey and else 3; and the side of the images, in pixels.

    Raises:
        ConfigError: no size is given, and the images are not squares of one size.
    """
    with _collect_warnings():  # decoding reports them
        results = list(_map_in_threads(lambda _, path: _probe(path), paths))
    headers = [result for result in results if not isinstance(result, _ImageProblem)]
    num_channels = 1 if all(grey for grey, _ in headers) else 3
    sizes = {size for _, size in headers} or {(1, 1)}
    width, height = min(sizes)
    if not size_given and (len(sizes) > 1 or width != height):
        extent = f"{width}x{height}" if len(sizes) == 1 else f"of {len(sizes)} sizes"
        raise ConfigError(f"the images are {extent}, not one square size: give --image-size")
    return num_channels, width


def digest_files(paths: list[Path]) -> list[str]:
    """Returns the SHA-256 of each file, in hex; "" for a file that cannot be read, which `decode_images` reports."""

    def digest(_: int, path: Path) -> str:
        try:
            return sha256_of_file(path)
        except OSError:
            return ""

    return ["" if isinstance(result, _ImageProblem) else result for result in _map_in_threads(digest, paths)]


def decode_images(paths: list[Path], num_channels: int, size: int, log: Callable[[str], None]) -> torch.Tensor:
    """Decodes and prepares images. Logs the progress and the warnings of Pillow.

    Args:
        paths: image files.
        num_channels: 1 for grey or 3 for RGB.
        size: width and height of the result, in pixels.
        log: receives each line for the user.

    Returns:
        Images, uint8 [N, C, size, size].

    Raises:
        ConfigError: the images do not fit in memory.
        DataError: images cannot be read; the message counts them and names the first.
    """
    shape = (len(paths), num_channels, size, size)
    required, available = math.prod(shape), available_memory()
    if required > available:  # the kernel would grant the memory now and kill the process later
        raise ConfigError(
            f"{len(paths)} images of {size}x{size} take {required / 1e9:.1f} GB and this machine, or its "
            f"container, has {available / 1e9:.1f} GB: give a smaller --image-size"
        )
    images = torch.empty(shape, dtype=torch.uint8)
    target = images.numpy()

    def decode(index: int, path: Path) -> None:
        target[index] = read_image(path, (num_channels, size, size))

    log_every = max(100, len(paths) // 10)  # a small folder is decoded before anybody reads a line
    unreadable: list[_ImageProblem] = []
    with _collect_warnings() as warned:
        for num_done, result in enumerate(_map_in_threads(decode, paths), start=1):
            if isinstance(result, _ImageProblem):
                unreadable.append(result)
            if num_done % log_every == 0:
                log(f"decoded {num_done} of {len(paths)} images")
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(paths)} images cannot be read: {_list_some(unreadable)}")
    if warned:
        log(f"Pillow warns about {len(warned)} of {len(paths)} images: {_list_some(list(warned.values()))}")
    return images


class _CurrentFile(threading.local):
    path = Path()
    """The file that this thread reads."""


_current_file = _CurrentFile()


def _map_in_threads(work: Callable[[int, Path], Result], paths: list[Path]) -> Iterator[Result | _ImageProblem]:
    """Yields `work(index, path)` for each path, in order; an _ImageProblem in place of an ImageError."""

    def run(index: int, path: Path) -> Result | _ImageProblem:
        _current_file.path = path
        try:
            return work(index, path)
        except ImageError as error:
            return _ImageProblem(path, str(error))

    with ThreadPoolExecutor(min(num_available_cpus(), _MAX_THREADS)) as pool:
        yield from pool.map(run, range(len(paths)), paths)  # cancels what has not started if the caller stops early


@contextmanager
def _collect_warnings() -> Iterator[dict[Path, _ImageProblem]]:
    """Collects the first warning of Pillow about each file; Pillow itself does not name the file."""
    from PIL.Image import DecompressionBombWarning

    collected: dict[Path, _ImageProblem] = {}

    def collect(message: Warning | str, *_: Any, **__: Any) -> None:
        path = _current_file.path
        collected.setdefault(path, _ImageProblem(path, " ".join(str(message).split())))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\.")
        # From half of the size at which Pillow refuses an image: photographs are as large.
        warnings.simplefilter("ignore", DecompressionBombWarning)
        warnings.showwarning = collect
        yield collected


def _list_some(problems: list[_ImageProblem]) -> str:
    listed = ", ".join(f"{problem.path} ({problem.reason})" for problem in problems[:_NUM_LISTED])
    return listed + (f" and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else "")


def _probe(path: Path) -> tuple[bool, tuple[int, int]]:
    """Returns whether the image is grey, and its size before EXIF turns it: a turn leaves a square as it is."""
    from PIL import Image

    with explain_decode_errors(path), Image.open(path) as image:
        return _is_grey(image), image.size


def _is_grey(image: "Image") -> bool:
    if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY_MODES
