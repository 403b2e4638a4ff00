"""Generates JPEG files that cost as much to decode as photographs: `python benchmarks/jpegs.py FOLDER --files 2000`.

A picture is noise of several scales, whose strength falls with its frequency as in photographs, with a few shapes with
sharp edges. Each file shows another part of one of `NUM_SCENES` such scenes, in other brightness, and is encoded anew,
so that no two files are equal. 500 x 375 pixels at quality 90 take about 75 kB.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

NUM_SCENES = 24
WIDTH, HEIGHT = 500, 375
_NUM_CLASSES = 10
_BLOCK = 500
"""Files that a process writes at a time."""

Pixels = npt.NDArray[np.uint8]


def scene(seed: int, width: int, height: int) -> Pixels:
    """Draws a scene, uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(10):  # from the whole picture to single pixels
        columns = min(width, 2 << octave)
        rows = max(2, columns * height // width)
        noise = random.standard_normal((rows, columns, 3)).astype(np.float32)
        noise = 0.7 * noise.mean(axis=2, keepdims=True) + 0.3 * noise  # brightness varies more than colour
        planes = [Image.fromarray(noise[:, :, c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += 60 * 0.9**octave * np.stack([np.asarray(plane) for plane in planes], axis=2)
    image = Image.fromarray((pixels + 120).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(25):
        left, top = random.uniform(0, width), random.uniform(0, height)
        size = random.uniform(0.02, 0.25) * width
        colour = (*(int(level) for level in random.integers(0, 255, 3)), int(random.integers(60, 255)))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((left, top, left + size, top + size * random.uniform(0.3, 1.5)), fill=colour)
    return np.asarray(image)


def write_folder(root: Path, num_files: int, *, width: int = WIDTH, height: int = HEIGHT, quality: int = 90) -> None:
    """Writes `num_files` pictures into class folders; leaves files that are there."""
    blocks = range(0, num_files, _BLOCK)
    for label in range(_NUM_CLASSES):
        (root / f"class-{label}").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        write = partial(_write_block, root, num_files, (width, height), quality)
        for done in pool.map(write, blocks):
            if done % 20_000 == 0:
                print(f"{done:,} of {num_files:,} files", flush=True)


def _write_block(root: Path, num_files: int, size: tuple[int, int], quality: int, first: int) -> int:
    import simplejpeg

    width, height = size
    scenes = _scenes(5 * width // 4, 5 * height // 4)
    end = min(num_files, first + _BLOCK)
    for number in range(first, end):
        path = root / f"class-{number % _NUM_CLASSES}" / f"{number:07d}.jpg"
        if path.exists():
            continue
        random = np.random.default_rng(number)
        left, top = random.integers(0, width // 4), random.integers(0, height // 4)
        part = scenes[random.integers(len(scenes))][top : top + height, left : left + width]
        levels = (np.arange(256) * random.uniform(0.7, 1.1)).clip(0, 255).astype(np.uint8)
        data = simplejpeg.encode_jpeg(levels[part], quality=quality, colorspace="RGB", colorsubsampling="420")
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(data)
        temporary.rename(path)
    return end


_cached: dict[tuple[int, int], list[Pixels]] = {}


def _scenes(width: int, height: int) -> list[Pixels]:
    if (width, height) not in _cached:
        number = NUM_SCENES if width * height < 1_000_000 else 1
        _cached[width, height] = [scene(seed, width, height) for seed in range(number)]
    return _cached[width, height]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--quality", type=int, default=90)
    args = parser.parse_args()
    write_folder(args.folder, args.files, width=args.width, height=args.height, quality=args.quality)


if __name__ == "__main__":
    main()
