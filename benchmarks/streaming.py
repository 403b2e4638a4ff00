"""Measures streamed images: `python benchmarks/streaming.py`, and `--memory 200000` for the memory of a rank.

Speed: our source against torchvision's `ImageFolder` with a `DataLoader`, on the same generated JPEG files and the same
cores, in rounds that alternate. Both read files that the system has cached, cut out a random part, resize it to 224
pixels, mirror half of the images, and make batches of 64; ours with as many threads as there are CPUs, theirs with each
number of worker processes, of which the best counts. Beside them, the rates at which the same threads decode the same
files and do nothing else: whole, and as the source does, a part resized. Each rate has the processor time for an image
beside it, which other work on the machine changes less.

Memory: one training process on a folder of as many files as `--memory` says; the largest resident memory that it has
while it lists, indexes and trains. Only the steps of `--seconds` after the first one are trained.

Writes `benchmarks/results/streaming-DATE.json` and a table in Markdown.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from jpegs import HEIGHT, WIDTH, write_folder
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop, ToTensor
from training import ROOT, write_results

from convoy.allocator import keep_freed_memory
from convoy.cpus import num_available_cpus
from trainer.config import TrainConfig
from trainer.data import load_dataset, without_test_images
from trainer.data.augment import augment_batch, draw_crops
from trainer.data.folder.decoder import decode_crop
from trainer.data.folder.options import FolderOptions
from trainer.hardware import describe
from trainer.loop.run import Run
from trainer.loop.streamed import StreamedSource
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import RECIPES
from trainer.recipes.augmentation import Augment
from trainer.records.run_folder import RunFolder
from trainer.train import setup

SIZE, BATCH_SIZE = 224, 64
AUGMENT = Augment(crop_area=0.08, flip="random")
WHOLE, PARTS = "decoding whole images alone", "decoding and resizing parts alone"


@contextmanager
def opened(folder: Path, data_dir: Path) -> Iterator[Run]:
    """Opens a run on the folder, streamed. Its network takes no step."""
    name = f"folder:{folder}"
    with World.join("cpu") as world, tempfile.TemporaryDirectory() as own:
        recipe = replace(RECIPES["cifar10-small"], dataset=name, augment=AUGMENT, global_batch_size=BATCH_SIZE)
        options = FolderOptions(image_size=SIZE, source="streamed")
        dataset = without_test_images(load_dataset(name, data_dir, options, log=lambda line: None))
        plan = RunFolder.plan(TrainConfig(run_dir=Path(own) / "run"), recipe, dataset, world)
        torch.set_num_threads(1)  # as in each process of a DataLoader
        yield setup(recipe, dataset, plan, world, Progress(is_main=False))


class Clock:
    """Measures rate and processor time."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), _processor_s()

    def stop(self, num_images: int) -> tuple[float, float]:
        """Returns images a second, and milliseconds of processor time for an image, with ended child processes."""
        seconds, cpu_s = time.perf_counter() - self._began, _processor_s() - self._cpu
        return num_images / seconds, 1000 * cpu_s / num_images


def _processor_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def our_rate(run: Run, num_images: int) -> tuple[float, float]:
    """Measures the streamed source, with the mirroring of the step, from its start to its last batch."""
    run.train_indices = torch.arange(len(run.dataset.train)).repeat(1 + num_images // len(run.dataset.train))[
        :num_images
    ]
    run.recipe = replace(run.recipe, epochs=1)
    clock = Clock()
    source = StreamedSource(run, run.dataset.train)  # type: ignore[arg-type]
    for step in range(run.num_steps):
        batch = source.batch(step)
        augment_batch(AUGMENT, batch.images, batch.indices, batch.augment_params)
    found = clock.stop(num_images)
    source.close()
    return found


def their_rate(folder: Path, num_images: int, num_workers: int, to_tensor: Callable[[], Any]) -> tuple[float, float]:
    """Measures ImageFolder and DataLoader, from the start of its workers to its last batch."""
    transform = Compose([RandomResizedCrop(SIZE, scale=(0.08, 1.0)), RandomHorizontalFlip(), to_tensor()])
    images = ImageFolder(str(folder), transform)
    sampler = RandomSampler(images, replacement=True, num_samples=num_images)
    clock = Clock()
    for _ in DataLoader(images, BATCH_SIZE, sampler=sampler, num_workers=num_workers):
        pass
    return clock.stop(num_images)


def decode_rate(paths: list[Path], num_images: int, *, cropped: bool) -> tuple[float, float]:
    """Measures threads that read and decode files, or random parts of them, and throw the pixels away."""
    sizes = torch.tensor([[HEIGHT, WIDTH]]).repeat(len(paths), 1)
    boxes = [(top, left, height, width) for top, left, height, width in draw_crops(AUGMENT, sizes, 0, 0).tolist()]

    def decode(block: list[int]) -> None:
        for number in block:
            if cropped:
                decode_crop(paths[number], boxes[number], SIZE, 3)
            else:
                simplejpeg.decode_jpeg(paths[number].read_bytes(), "RGB")

    numbers = [number % len(paths) for number in range(num_images)]
    blocks = [numbers[start : start + 8] for start in range(0, num_images, 8)]
    clock = Clock()
    with ThreadPoolExecutor(num_available_cpus()) as pool:
        list(pool.map(decode, blocks))
    return clock.stop(num_images)


def measure_speed(
    folder: Path, data_dir: Path, num_images: int, num_rounds: int, num_workers: list[int]
) -> dict[str, list[tuple[float, float]]]:
    """Returns the images a second of each way and their processor time, a pair for each round."""
    paths = sorted(folder.rglob("*.jpg"))
    found: dict[str, list[tuple[float, float]]] = {}
    with opened(folder, data_dir) as run:  # which reads all files, so that the system caches them
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "Convoy": partial(our_rate, run, num_images),
            WHOLE: partial(decode_rate, paths, num_images, cropped=False),
            PARTS: partial(decode_rate, paths, num_images, cropped=True),
            **{f"DataLoader, {n} workers": partial(their_rate, folder, num_images, n, ToTensor) for n in num_workers},
            **{
                f"DataLoader, {n} workers, bytes": partial(their_rate, folder, num_images, n, PILToTensor)
                for n in num_workers
            },
        }
        for _ in range(num_rounds):
            for name, way in ways.items():
                found.setdefault(name, []).append(way())
                print(f"{name}: {found[name][-1][0]:.0f} images/s, {found[name][-1][1]:.2f} ms", flush=True)
    return found


def measure_memory(folder: Path, data_dir: Path, recipe: str, seconds: float) -> dict[str, float]:
    """Trains on the folder for some seconds after the first step; returns the largest memory in bytes, and times."""
    run_dir = Path(tempfile.mkdtemp(prefix="convoy-bench-")) / "run"
    options = ["--dataset", f"folder:{folder}", "--image-size", str(SIZE), "--source", "streamed", "--device", "cpu"]
    batch = ["--global-batch-size", "8"]  # a CPU holds the activations of a batch, too: a step of 64 images takes 2 GB
    command = [sys.executable, "trainer/main.py", "--recipe", recipe, *options, *batch, "--no-export"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--data-dir", str(data_dir), "--run-dir", str(run_dir)], cwd=ROOT)
    largest: dict[str, int] = {}
    first_step_s: float | None = None
    while process.poll() is None:
        for name, number in _memory_of(process.pid).items():
            largest[name] = max(number, largest.get(name, 0))
        now = time.perf_counter() - began
        if first_step_s is None and (run_dir / "metrics.jsonl").exists():
            first_step_s = now
        if first_step_s is not None and now > first_step_s + seconds:
            process.send_signal(signal.SIGTERM)
            first_step_s += 1e9  # once
        time.sleep(0.2)
    shutil.rmtree(run_dir.parent)
    if first_step_s is None:
        sys.exit(f"{' '.join(command)} failed with code {process.returncode}")
    return {**largest, "seconds_to_training": first_step_s % 1e9}


def _memory_of(pid: int) -> dict[str, int]:
    """Returns the bytes of a process that are resident: all, and without the pages of files, which it may lose."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    values = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {name: 1024 * int(values[name][0]) for name in ("VmRSS", "RssAnon") if name in values}


def table(speed: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Returns the rows of the table in Markdown."""
    rates = {name: statistics.median(rate for rate, _ in pairs) for name, pairs in speed.items()}
    cpu_ms = {name: statistics.median(own for _, own in pairs) for name, pairs in speed.items()}
    lines = [
        "| way | images/s | smallest to largest | Convoy's rate over it | processor time an image | over Convoy's |",
        "|---|---|---|---|---|---|",
    ]
    for name, pairs in speed.items():
        own = [rate for rate, _ in pairs]
        lines.append(
            f"| {name} | {rates[name]:.0f} | {min(own):.0f} to {max(own):.0f} | {rates['Convoy'] / rates[name]:.2f} | "
            f"{cpu_ms[name]:.2f} ms | {cpu_ms[name] / cpu_ms['Convoy']:.2f} |"
        )
    lines.append("")
    for suffix, what in (("workers", "floating-point images (`ToTensor`)"), ("bytes", "bytes (`PILToTensor`)")):
        best = max((name for name in rates if name.endswith(suffix)), key=lambda name: rates[name])
        lines.append(
            f"- {rates['Convoy'] / rates[best]:.2f} times the rate of the best DataLoader that makes {what}: {best}; "
            f"its processor time is {cpu_ms[best] / cpu_ms['Convoy']:.2f} times ours."
        )
    for name in (WHOLE, PARTS):
        share, of_cpu = rates["Convoy"] / rates[name], cpu_ms[name] / cpu_ms["Convoy"]
        lines.append(f"- {100 * share:.0f} % of the rate of {name}; {100 * of_cpu:.0f} % by processor time.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="files of the folder for the speed")
    parser.add_argument("--images", type=int, default=3000, help="images of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="of the DataLoader")
    parser.add_argument("--memory", type=int, metavar="FILES", help="measure the memory instead, on so many files")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files")
    parser.add_argument("--recipe", default="photos", help="the training whose memory is measured")
    parser.add_argument("--seconds", type=float, default=60, help="of that training")
    parser.add_argument("--folder", type=Path, help="keep the files here, and use those that are there")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="convoy-bench-") as own:
        folder, data_dir = (args.folder or Path(own) / "files").absolute(), Path(own) / "data"
        write_folder(folder, args.memory or args.files, quality=args.quality)
        machine = describe(torch.device("cpu"))
        command = f"`python benchmarks/streaming.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
        num_bytes = sum(entry.stat().st_size for path in folder.iterdir() for entry in os.scandir(path))
        files = f"{args.memory or args.files:,} files of {WIDTH} x {HEIGHT} pixels, {num_bytes / 1e9:.2f} GB"
        lines = [f"{command} on {machine['device']}, {num_available_cpus()} CPUs; {files}.", ""]
        if args.memory:
            found = measure_memory(folder, data_dir, args.recipe, args.seconds)
            print(json.dumps(found))
            lines += [
                f"Decoded at {SIZE} pixels: {args.memory * 3 * SIZE**2 / 1e9:.1f} GB. Largest resident memory of the "
                f"rank: {found['VmRSS'] / 1e9:.2f} GB, of which {found['RssAnon'] / 1e9:.2f} GB at most were its own, "
                f"not pages of files. The first step began after {found['seconds_to_training']:.0f} s.",
            ]
            write_results("streaming-memory", "Memory of streamed images", machine, {"memory": found}, lines)
        else:
            speed = measure_speed(folder, data_dir, args.images, args.rounds, args.workers)
            write_results("streaming", "Streamed images", machine, {"speed": speed}, [*lines, *table(speed)])


if __name__ == "__main__":
    main()
