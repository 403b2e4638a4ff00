"""Writes folders of images for tests."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.data import Dataset

Load = Callable[..., Dataset]
"""Loads the folder at a path, with an image size or without, and with other options of `load_dataset`."""


def put(path: Path, colour: int | tuple[int, ...] = 100, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """Writes a PNG whose bytes differ from those of any other path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = PngInfo()
    note.add_text("Comment", os.fsencode(f"{path.parent.name}/{path.name}"))
    Image.new(mode, size, colour).save(path, pnginfo=note)
    return path


def put_class(folder: Path, count: int, colour: int = 100, mode: str = "RGB") -> None:
    """Writes PNGs of 8 x 8 pixels of one colour. The last pixel differs between folders."""
    for index in range(count):
        path = put(folder / f"{index:03d}.png", colour if mode == "L" else (colour,) * 3, mode=mode)
        with Image.open(path) as image:
            own = zlib.crc32(os.fsencode("/".join(path.parts[-3:])))
            image.putpixel((7, 7), own % 256 if mode == "L" else tuple(own.to_bytes(4, "little")[:3]))
            image.save(path)
