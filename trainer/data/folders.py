"""People's own images: `folder:PATH` in torchvision's ImageFolder layout, decoded once into one file.

PATH/<class>/*.png, or PATH/train/<class>/* with, if wanted, PATH/val (or valid, validation) and PATH/test. Without a
test folder the bytes of each file decide whether it is a test image. The decoded file's name follows from the listing
(names, sizes, times), so a changed folder is decoded anew.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.data.images import decode_images, digest_files, probe_images
from trainer.data.split import tenth_by_content
from trainer.data.store import Content, Decoded, ImageSet, Say, open_or_make
from trainer.errors import ConfigError, DataError

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_VALIDATION_NAMES = ("val", "valid", "validation")
_RULES = 2
"""Which images of a listing go where. Another number, and all folders are decoded anew."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An image's path and its label."""

    path: Path
    label: int


@dataclass(frozen=True, slots=True)
class Listing:
    """A folder's classes and samples, before any image is opened."""

    root: Path
    classes: tuple[str, ...]
    parts: dict[str, list[Sample]]


def load_folder(root: Path, data_dir: Path, *, image_size: int | None, verify: bool, say: Say) -> Decoded:
    """Opens the folder of images at an absolute path, decoding it first where it is new or has changed.

    Raises ConfigError for a path that is no image folder or needs an image size, DataError for what cannot be
    read.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"an image size must be at least 1, and {image_size} is not")
    listing = list_folder(root)
    place = decoded_place(root, data_dir)
    size = "native" if image_size is None else str(image_size)
    path = place / f"{size}-{_listing_key(listing)}.pt"

    def make() -> Content:
        content = _decode_listing(listing, image_size, say)
        for older in place.glob(f"{size}-*.pt"):
            older.unlink(missing_ok=True)
        return content

    return open_or_make(path, make, lock_path=place.with_suffix(".lock"), expected_sha256=None, verify=verify, say=say)


def decoded_place(root: Path, data_dir: Path) -> Path:
    """Where the folder's decoded files lie, one for each image size, or will."""
    return data_dir / "folders" / f"{root.name}-{_digest(os.fsencode(root))[:12]}"


def list_folder(root: Path) -> Listing:
    """Finds classes and images. Raises ConfigError for a wrong path, DataError for a folder with gaps."""
    try:
        folders = _part_folders(root)
        classes = tuple(_class_names(folders["train"]))
        if not classes:
            raise ConfigError(f"{root} has no class folders: images belong in {root.name}/<class>/")
        if len(classes) < 2:
            raise DataError(f"{folders['train']} has one class only ({classes[0]}): nothing to tell apart")
        parts = {part: list(_samples(folder, classes)) for part, folder in folders.items()}
        for part, samples in parts.items():
            if not samples:  # as test images without labels come, for a competition
                raise DataError(
                    f"{folders[part]} has no class folders, so that nobody knows what its images show: put them in "
                    f"{folders[part].name}/<class>/, or move the folder elsewhere"
                )
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} does not exist") from error
    except NotADirectoryError as error:
        raise ConfigError(f"{error.filename} is a file, not a folder of images") from error
    except PermissionError as error:
        raise ConfigError(f"{error.filename} may not be read: {error.strerror}") from error
    return Listing(root, classes, parts)


def _part_folders(root: Path) -> dict[str, Path]:
    """The folder of each part; a flat folder is its own training part (even with a class named `train`)."""
    names = _class_names(root)
    if "train" not in names or not _class_names(root / "train"):
        return {"train": root}
    folders = {"train": root / "train"}
    validation = [name for name in _VALIDATION_NAMES if name in names]
    if len(validation) > 1:
        raise ConfigError(f"{root} has both {validation[0]} and {validation[1]}: keep one")
    if validation:
        folders["validation"] = root / validation[0]
    if "test" in names:
        folders["test"] = root / "test"
    return folders


def _class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _samples(folder: Path, classes: tuple[str, ...]) -> Iterator[Sample]:
    for name in _class_names(folder):
        if name not in classes:
            raise DataError(f"{folder / name} is a class that the training images do not have")
        label = classes.index(name)
        paths = sorted(_image_paths(folder / name))
        if not paths:
            raise DataError(f"{folder / name} is an empty class: no image in it")
        yield from (Sample(path, label) for path in paths)


def _image_paths(folder: Path) -> Iterator[Path]:
    """Images under `folder`, links followed, each real folder once: a link may lead back up. What is hidden is not ours
    (`.ipynb_checkpoints`, `.thumbnails`): its copies would stand in training and test set both.
    """
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.startswith(".") and file.lower().endswith(_EXTENSIONS):
                yield Path(where, file)


def _raise(error: OSError) -> None:
    raise error


def _listing_key(listing: Listing) -> str:
    lines: list[object] = [_RULES, listing.classes]
    for part, samples in listing.parts.items():
        for sample in samples:
            try:
                status = sample.path.stat()
            except OSError as error:
                raise DataError(f"{sample.path} cannot be read: {error.strerror}") from error
            name = os.fsencode(sample.path.relative_to(listing.root)).hex()
            lines.append([part, name, status.st_size, status.st_mtime_ns])
    return _digest(json.dumps(lines).encode())[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decode_listing(listing: Listing, image_size: int | None, say: Say) -> Content:
    name = f"folder:{listing.root}"
    parts = dict(listing.parts)
    all_paths = [sample.path for samples in parts.values() for sample in samples]
    num_channels, native_size = probe_images(all_paths, sized=image_size is not None)
    if "test" not in parts:
        parts["train"], parts["test"] = _hold_out_test(listing, say)
    paths = [sample.path for samples in parts.values() for sample in samples]
    size = image_size or native_size
    images = decode_images(paths, num_channels, size, lambda line: say(f"{name}: {line}"))
    labels = torch.tensor([sample.label for samples in parts.values() for sample in samples], dtype=torch.int64)
    sets: dict[str, ImageSet] = {}
    start = 0
    for part, samples in parts.items():
        end = start + len(samples)
        sets[part] = ImageSet(images[start:end], labels[start:end])
        start = end
    return Content(name, listing.classes, sets["train"], sets["test"], sets.get("validation"))


def _hold_out_test(listing: Listing, say: Say) -> tuple[list[Sample], list[Sample]]:
    samples = listing.parts["train"]
    digests = digest_files([sample.path for sample in samples])
    chosen = tenth_by_content(digests, [sample.label for sample in samples])
    if not chosen:
        raise DataError(f"{listing.root} has no class of two different images: too few to hold any out as test set")
    parts: tuple[list[Sample], list[Sample]] = [], []
    for sample, digest in zip(samples, digests, strict=True):
        parts[digest in chosen].append(sample)
    say(
        f"folder:{listing.root}: no test folder: {len(parts[1])} of {len(samples)} images are held out as test set, by "
        "their content"
    )
    return parts
