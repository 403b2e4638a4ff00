"""People's own images: `folder:PATH` in torchvision's ImageFolder layout, decoded once into one file.

PATH/<class>/*.png, or PATH/train/<class>/* with, if wanted, PATH/val (or valid, validation) and PATH/test. Without a
test folder the bytes of each file decide whether it is a test image. The decoded file's name follows from the listing
(names, sizes, times), so a changed folder is decoded anew.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.data.folder.decode import decode_images, digest_files, probe_images
from trainer.data.folder.duplicates import describe_copies
from trainer.data.split import tenth_by_content
from trainer.data.store import Content, Decoded, ImageSet, Say, discard, open_or_make
from trainer.errors import ConfigError, DataError

_KINDS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_NEARLY_PARTS = ("training", "dev", "testing")
_NUM_NAMED = 5
_RULES = 3
"""Which images of a listing go where, and what is told of them. Another number, and all folders are decoded anew."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image's file and its label."""

    path: Path
    label: int
    size_bytes: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Listing:
    """A folder's classes and samples, before any image is opened."""

    root: Path
    classes: tuple[str, ...]
    parts: dict[str, list[ImageFile]]
    notes: tuple[str, ...]
    """What the user should know of what is left out."""


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
            discard(older)
        return content

    lock_path = place.with_suffix(".lock")
    decoded = open_or_make(path, make, lock_path=lock_path, expected_sha256=None, verify=verify, say=say)
    for note in decoded.content.notes:
        say(note)
    return decoded


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
        skipped: Counter[str] = Counter()
        parts = {part: list(_samples(folder, classes, skipped)) for part, folder in folders.items()}
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
    unused = [] if folders["train"] == root else [name for name in _class_names(root) if name.lower() not in _PARTS]
    notes = [f"{name} is not used: images are in {folders['train'].name}" for name in unused]
    notes += [_describe(skipped, "skipped ")] if skipped else []
    return Listing(root, classes, parts, tuple(notes))


def _part_folders(root: Path) -> dict[str, Path]:
    """The folder of each part; a flat folder is its own training part (even with a class named `train`)."""
    names = _class_names(root)
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_PARTS.get(name.lower(), ""), []).append(name)
    is_flat = not any(_class_names(root / name) for name in found.get("train", []))
    misnamed = [name for name in names if name.lower() in (*_NEARLY_PARTS, *(_PARTS if is_flat else ()))]
    misnamed = [name for name in misnamed if _holds_only_folders(root / name)]
    if misnamed:
        raise ConfigError(
            f"{root} has {' and '.join(misnamed)}, which look like parts of a data set, not like classes: call them "
            "train, val and test (train must be there), or give another folder"
        )
    if is_flat:
        return {"train": root}
    for part in dict.fromkeys(_PARTS.values()):
        if len(both := found.get(part, [])) > 1:
            raise ConfigError(f"{root} has both {both[0]} and {both[1]}: keep one")
    return {part: root / found[part][0] for part in dict.fromkeys(_PARTS.values()) if part in found}


def _holds_only_folders(folder: Path) -> bool:
    """Whether there are folders in it, and no images beside them."""
    return bool(_class_names(folder)) and not any(path.suffix.lower() in _KINDS for path in folder.iterdir())


def _class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _samples(folder: Path, classes: tuple[str, ...], skipped: Counter[str]) -> Iterator[ImageFile]:
    for name in _class_names(folder):
        if name not in classes:
            raise DataError(f"{folder / name} is a class that the training images do not have")
        label = classes.index(name)
        samples: list[ImageFile] = []
        others: Counter[str] = Counter()
        for path in sorted(_files_under(folder / name)):
            kind = path.suffix.lower()
            if kind not in _KINDS:
                others[kind or "no ending"] += 1
            elif stat.S_ISREG((status := _status(path)).st_mode):
                samples.append(ImageFile(path, label, status.st_size, status.st_mtime_ns))
            else:  # whoever reads a pipe waits for good
                others["pipes and the like"] += 1
        if not samples:
            only = f", only {_describe(others)}" if others else ""
            raise DataError(f"{folder / name} is an empty class: no image in it{only}; images are {', '.join(_KINDS)}")
        skipped += others
        yield from samples


def _describe(files: Counter[str], what: str = "") -> str:
    number, kinds = files.total(), [kind for kind, _ in files.most_common(_NUM_NAMED)]
    more = ", …" if len(files) > len(kinds) else ""
    return f"{number} file{'s' if number > 1 else ''} {what}({', '.join(kinds)}{more})"


def _files_under(folder: Path) -> Iterator[Path]:
    """Files under `folder`, links followed, each real folder once: a link may lead back up. What is hidden is not ours
    (`.ipynb_checkpoints`, `.thumbnails`): its copies would stand in training and test set both.
    """
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # the first name of a linked one
        yield from (Path(where, name) for name in files if not name.startswith("."))


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise error


def _listing_key(listing: Listing) -> str:
    lines: list[object] = [_RULES, listing.classes]
    for part, samples in listing.parts.items():
        for sample in samples:
            name = os.fsencode(sample.path.relative_to(listing.root)).hex()
            lines.append([part, name, sample.size_bytes, sample.changed_ns])
    return _digest(json.dumps(lines).encode())[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decode_listing(listing: Listing, image_size: int | None, say: Say) -> Content:
    name = f"folder:{listing.root}"
    notes = [f"{name}: {note}" for note in listing.notes]
    parts = dict(listing.parts)
    all_paths = [sample.path for samples in parts.values() for sample in samples]
    num_channels, native_size = probe_images(all_paths, sized=image_size is not None)
    if "test" not in parts:
        parts["train"], parts["test"] = _hold_out_test(listing)
        num_test, num_images = len(parts["test"]), len(all_paths)
        how = f"{num_test} of {num_images} images are held out as test set, by their content"
        notes.append(f"{name}: no test folder: {how}")
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
    notes += [f"warning: {name}: {line}" for line in describe_copies(sets)]
    return Content(name, listing.classes, sets["train"], sets["test"], sets.get("validation"), tuple(notes))


def _hold_out_test(listing: Listing) -> tuple[list[ImageFile], list[ImageFile]]:
    samples = listing.parts["train"]
    digests = digest_files([sample.path for sample in samples])
    chosen = tenth_by_content(digests, [sample.label for sample in samples])
    if not chosen:
        raise DataError(f"{listing.root} has no class of two different images: too few to hold any out as test set")
    parts: tuple[list[ImageFile], list[ImageFile]] = [], []
    # In the order of their content, so that new names for the same images make neither another set nor a new look.
    for digest, sample in sorted(zip(digests, samples, strict=True), key=lambda each: (each[1].label, each[0])):
        parts[digest in chosen].append(sample)
    return parts
