"""Decodes image files of any kind and size into one uint8 tensor, in threads: Pillow leaves the GIL.

Orientation from EXIF is applied, transparency is laid on white, 16 bits become the upper 8, and only the
first frame of an animation counts.
"""

import math
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from convoy.cpus import available_memory, num_available_cpus
from trainer.data.store import Say
from trainer.errors import ConfigError, DataError
from trainer.files import sha256_of_file

if TYPE_CHECKING:
    from PIL.Image import Image

_BAD_BYTES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on bad bytes."""
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}
_NUM_NAMED = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


class _AtWork(threading.local):
    path = Path()
    """The file that this thread is reading."""


_at_work = _AtWork()


@dataclass(frozen=True, slots=True)
class _Complaint:
    """Of a file that cannot be read, or of which Pillow warns."""

    path: Path
    reason: str


def probe_images(paths: list[Path], *, sized: bool) -> tuple[int, int]:
    """Opens every header: 1 channel if all images are grey and else 3, and the side that all share.

    Images that cannot be opened are left for `decode_images` to name. Raises ConfigError when no size is given
    (`sized` false) and the images are not all the same square.
    """
    with _warnings_heard():  # and again when the images are decoded
        headers = [header for header in _for_each(paths, paths, _probe) if not isinstance(header, _Complaint)]
    num_channels = 1 if all(grey for grey, _ in headers) else 3
    sizes = {size for _, size in headers} or {(1, 1)}
    width, height = min(sizes)
    if not sized and (len(sizes) > 1 or width != height):
        extent = f"{width}x{height}" if len(sizes) == 1 else f"of {len(sizes)} sizes"
        raise ConfigError(f"the images are {extent}, not one square size: give --image-size")
    return num_channels, width


def digest_files(paths: list[Path]) -> list[str]:
    """SHA-256 of each file's bytes; empty for those that cannot be read, which `decode_images` names."""
    digests = _for_each(paths, paths, sha256_of_file)
    return ["" if isinstance(digest, _Complaint) else digest for digest in digests]


def decode_images(paths: list[Path], num_channels: int, size: int, say: Say) -> torch.Tensor:
    """Decodes into uint8 [N, C, size, size]: shorter side resized with antialiasing, then the centre.

    Says a line every tenth, or every hundred images, and one of what Pillow warns of. Raises DataError that counts the
    images that cannot be read and names the first, ConfigError when they cannot fit in memory.
    """
    shape = (len(paths), num_channels, size, size)
    needed, there = math.prod(shape), available_memory()
    if needed > there:  # the kernel would promise the memory now and kill the process later
        raise ConfigError(
            f"{len(paths)} images of {size}x{size} take {needed / 1e9:.1f} GB and this machine, or its "
            f"container, has {there / 1e9:.1f} GB: give a smaller --image-size"
        )
    images = torch.empty(shape, dtype=torch.uint8)
    target = images.numpy()

    def decode(index: int) -> None:
        target[index] = _read(paths[index], num_channels, size)

    step = max(100, len(paths) // 10)  # a small folder is decoded before a line is read
    bad: list[_Complaint] = []
    with _warnings_heard() as heard:
        for done, result in enumerate(_for_each(paths, range(len(paths)), decode), start=1):
            if isinstance(result, _Complaint):
                bad.append(result)
            if done % step == 0:
                say(f"decoded {done} of {len(paths)} images")
    if bad:
        raise DataError(f"{len(bad)} of {len(paths)} images cannot be read: {_name_some(bad)}")
    if heard:
        say(f"{len(heard)} of {len(paths)} images are read although Pillow warns: {_name_some(list(heard.values()))}")
    return images


@contextmanager
def _warnings_heard() -> Iterator[dict[Path, _Complaint]]:
    """Around what Pillow reads: its first warning of each file. It names no file, and prints where it stands itself."""
    from PIL.Image import DecompressionBombWarning

    heard: dict[Path, _Complaint] = {}

    def hear(message: Warning | str, *_: Any, **__: Any) -> None:
        heard.setdefault(_at_work.path, _Complaint(_at_work.path, " ".join(str(message).split())))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\.")
        warnings.simplefilter("ignore", DecompressionBombWarning)  # from half of what it refuses on: a photograph
        warnings.showwarning = hear
        yield heard


def _name_some(complaints: list[_Complaint]) -> str:
    named = ", ".join(f"{complaint.path} ({complaint.reason})" for complaint in complaints[:_NUM_NAMED])
    return named + (f" and {len(complaints) - _NUM_NAMED} more" if len(complaints) > _NUM_NAMED else "")


def _for_each(
    paths: Sequence[Path], items: Sequence[Item], work: Callable[[Item], Result]
) -> Iterator[Result | _Complaint]:
    """Results in order, from a pool of threads; `paths` names the items that fail."""
    from PIL import Image

    def read(path: Path, item: Item) -> Result:
        _at_work.path = path
        return work(item)

    with ThreadPoolExecutor(min(num_available_cpus(), 8)) as pool:
        try:
            futures = [pool.submit(read, path, item) for path, item in zip(paths, items, strict=True)]
            for path, future in zip(paths, futures, strict=True):
                try:
                    yield future.result()
                except Image.DecompressionBombError:
                    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
                    yield _Complaint(path, f"it has more than {limit:.0f} million pixels: scale it down")
                except _BAD_BYTES as error:
                    reason = str(error).replace(str(path), "it").replace("\n", " ")
                    yield _Complaint(path, reason or type(error).__name__)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _probe(path: Path) -> tuple[bool, tuple[int, int]]:
    from PIL import Image

    with Image.open(path) as image:
        return _is_grey(image), image.size  # not yet turned as EXIF says: that leaves a square as it is


def _is_grey(image: "Image") -> bool:
    if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY_MODES


def _read(path: Path, num_channels: int, size: int) -> npt.NDArray[np.uint8]:
    """One image, uint8 [C, size, size]."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = _to_eight_bits(ImageOps.exif_transpose(opened))
    image = _on_white(image).convert("L" if num_channels == 1 else "RGB")
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    return pixels[None] if num_channels == 1 else pixels.transpose(2, 0, 1)


def _to_eight_bits(image: "Image") -> "Image":
    """16-bit grey (which Pillow would clip at 255) by its upper byte."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def _on_white(image: "Image") -> "Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white
