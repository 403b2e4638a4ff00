"""Compares ways to decode a random crop of a JPEG file to 224 pixels: `python benchmarks/decoders.py FOLDER …`.

Every way decodes the same crops of the same files, in one thread, in rounds that alternate; the table has the medians
of its processor time, which other work on the machine changes less than the time on the clock. nvImageCodec, which
decodes a crop alone, is measured where it is installed (`pip install nvidia-nvimgcodec-cu12`).
The reference for the differences is Pillow's full decoding with an antialiased resize. docs/decisions has the choice.
"""

import argparse
import importlib
import io
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from convoy.images import Box
from trainer.data.augment import draw_crops
from trainer.data.folder.decoder import _crop_jpeg
from trainer.recipes.augmentation import Augment

Pixels = npt.NDArray[np.uint8]
Way = Callable[[bytes, Box], Pixels]
SIZE = 224


def rectangle(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom in pixels."""
    top, left = round(box[0] * height), round(box[1] * width)
    return left, top, round((box[1] + box[3]) * width), round((box[0] + box[2]) * height)


def pillow(data: bytes, box: Box) -> Pixels:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop = image.crop(rectangle(box, image.height, image.width))
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def pillow_draft(data: bytes, box: Box) -> Pixels:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (math.ceil(SIZE / box[3]), math.ceil(SIZE / box[2])))
    crop = image.crop(rectangle(box, image.height, image.width))
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def torchvision(data: bytes, box: Box) -> Pixels:
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    left, top, right, bottom = rectangle(box, *image.shape[1:])
    crop = image[None, :, top:bottom, left:right]
    found: Pixels = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0].numpy()
    return found


def simplejpeg_pillow(data: bytes, box: Box) -> Pixels:
    """simplejpeg decodes the whole image into 4 bytes a pixel, which Pillow resizes where they are."""
    frame = simplejpeg.decode_jpeg(data, "RGBX")
    image = Image.frombuffer("RGBX", (frame.shape[1], frame.shape[0]), frame, "raw", "RGBX", 0, 1)
    crop = image.crop(rectangle(box, image.height, image.width))
    resized = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return resized[:, :, :3].transpose(2, 0, 1)


def simplejpeg_full(data: bytes, box: Box) -> Pixels:
    frame = simplejpeg.decode_jpeg(data, "RGB")
    left, top, right, bottom = rectangle(box, *frame.shape[:2])
    crop = torch.from_numpy(np.ascontiguousarray(frame[top:bottom, left:right])).permute(2, 0, 1)[None]
    found: Pixels = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0].numpy()
    return found


def simplejpeg_eighths(data: bytes, box: Box) -> Pixels:
    """simplejpeg at the smallest scale in eighths that covers the crop."""
    height, width = math.ceil(SIZE / box[2]), math.ceil(SIZE / box[3])
    frame = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    left, top, right, bottom = rectangle(box, *frame.shape[:2])
    crop = torch.from_numpy(np.ascontiguousarray(frame[top:bottom, left:right])).permute(2, 0, 1)[None]
    found: Pixels = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0].numpy()
    return found


def convoy(data: bytes, box: Box) -> Pixels:
    found = _crop_jpeg(data, box, SIZE, 3)
    assert found is not None
    return found


def nvimagecodec() -> tuple[Way, Way]:
    """Returns how nvImageCodec decodes a crop alone, which torch resizes, and how it decodes a whole image."""
    library = importlib.import_module("nvidia.nvimgcodec")
    backends = [library.Backend(library.CPU_ONLY)]
    options = {"max_num_cpu_threads": 1, "options": ":fancy_upsampling=1"}  # as libjpeg does by itself
    decoder = library.Decoder(device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY, backends=backends, **options)

    def crop(data: bytes, box: Box) -> Pixels:
        stream = library.CodeStream(data)
        left, top, right, bottom = rectangle(box, stream.height, stream.width)
        part = stream.get_sub_code_stream(region=library.Region(top, left, bottom, right))
        pixels = torch.from_numpy(np.asarray(decoder.decode(part).cpu())).permute(2, 0, 1)[None]
        found: Pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)[0].numpy()
        return found

    return crop, lambda data, _: np.asarray(decoder.decode(library.CodeStream(data)).cpu())


WAYS: dict[str, Way] = {
    "Pillow": pillow,
    "Pillow, draft": pillow_draft,
    "torchvision.io, torch resize": torchvision,
    "simplejpeg, Pillow resize": simplejpeg_pillow,
    "simplejpeg, torch resize": simplejpeg_full,
    "the same, scales in eighths": simplejpeg_eighths,
    "Convoy": convoy,
}
ALONE: dict[str, Way] = {"simplejpeg alone, whole image": lambda data, _: simplejpeg.decode_jpeg(data, "RGB")}
with suppress(ModuleNotFoundError):
    WAYS["nvImageCodec, the crop, torch resize"], ALONE["nvImageCodec alone, whole image"] = nvimagecodec()


def measure(files: list[bytes], boxes: list[Box], num_rounds: int) -> dict[str, float]:
    """Returns the milliseconds for an image, and those of decoding alone, by way."""
    times: dict[str, list[float]] = {}
    for _ in range(num_rounds):
        for name, way in {**WAYS, **ALONE}.items():
            began = time.process_time()
            for data, box in zip(files, boxes, strict=True):
                way(data, box)
            times.setdefault(name, []).append(1000 * (time.process_time() - began) / len(files))
    return {name: statistics.median(own) for name, own in times.items()}


def measure_nvjpeg(files: list[bytes], num_rounds: int) -> float:
    """Returns the milliseconds on the clock that nvJPEG takes for an image, whole and in batches of 100 files."""
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    times = []
    for _ in range(num_rounds + 1):  # the first starts the library
        began = time.perf_counter()
        for first in range(0, len(encoded), 100):
            decoded = decode_jpeg(encoded[first : first + 100], ImageReadMode.RGB, device="cuda")
            decoded[-1].sum().item()  # waits for the device
        times.append(1000 * (time.perf_counter() - began) / len(files))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[: args.files]]
        sizes = torch.tensor([simplejpeg.decode_jpeg_header(data)[:2] for data in files])
        boxes = [tuple(box) for box in draw_crops(Augment(crop_area=0.08), sizes, 0, 0).tolist()]
        found = measure(files, boxes, args.rounds)
        num_bytes = sum(map(len, files)) / len(files)
        print(f"\n{len(files)} files of {sizes[0, 1]} x {sizes[0, 0]} pixels, {num_bytes / 1000:.0f} kB each\n")
        print("| way | ms an image | largest difference | mean difference |\n|---|---|---|---|")
        reference = [pillow(data, box).astype(int) for data, box in zip(files, boxes, strict=True)]
        for name, milliseconds in found.items():
            cells = [name, f"{milliseconds:.2f}", "", ""]
            if name in WAYS:
                pairs = zip(files, boxes, reference, strict=True)
                errors = [np.abs(WAYS[name](data, box) - expected) for data, box, expected in pairs]
                cells[2:] = [str(max(error.max() for error in errors)), f"{np.mean([e.mean() for e in errors]):.3f}"]
            print(f"| {' | '.join(cells)} |")
        if torch.cuda.is_available():
            print(f"| nvJPEG, whole images, on the clock | {measure_nvjpeg(files, args.rounds):.2f} | | |")


if __name__ == "__main__":
    main()
