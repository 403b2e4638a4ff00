"""Lists the classes and image files of a folder in torchvision's ImageFolder layout, without opening an image.

The layout is PATH/<class>/*.png, or PATH/train/<class>/* with, optionally, PATH/val (or valid, validation) and
PATH/test. Hidden folders and those that systems make are passed over at every level.
"""

import hashlib
import json
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convoy.images import EXTENSIONS
from trainer.errors import ConfigError, DataError

_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""The split by the name of its folder, in lower case."""
_UNSUPPORTED_SPLITS = ("training", "dev", "testing")
"""Folder names that probably mean splits, but are not accepted as such."""
SYSTEM_FOLDERS = frozenset(
    name.casefold()
    for name in (
        *("@eaDir", "#recycle", "#snapshot", "@tmp", "@sharebin"),  # Synology: thumbnails, deleted files
        *("@Recycle", "@Recently-Snapshot", ".@__thumb"),  # QNAP
        *("$RECYCLE.BIN", "System Volume Information", "found.000", "Config.Msi"),  # Windows
        *("__MACOSX", ".AppleDouble", ".Trashes", ".fseventsd", ".Spotlight-V100", ".TemporaryItems"),  # macOS
        *("Network Trash Folder", "Temporary Items", "TheVolumeSettingsFolder"),
        *("lost+found", ".Trash", ".Trash-1000", ".thumbnails", ".snapshot", "~snapshot", ".snapshots"),  # file systems
        *("_gsdata_", ".dropbox.cache", ".stfolder", ".stversions", ".sync", ".tmp.drivedownload"),  # synchronization
        *("_vti_cnf", "_vti_pvt", "_notes", ".picasaoriginals"),  # web and picture editors
        *("__pycache__", ".ipynb_checkpoints", ".git", ".svn"),  # programming
    )
)
"""Names, in lower case, of folders that operating systems, file servers and programs make inside the user's own."""
_NUM_LISTED = 5
_VERSION = 4
"""Version of the rules that put images into splits and write notes. A new one decodes every folder again."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file and its label."""

    path: Path
    label: int
    size_bytes: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The classes and image files of a folder."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]
    notes: tuple[str, ...]
    """Lines for the user about files and folders that are not used."""

    def key(self) -> str:
        """Returns 16 hex digits that change with the name, size or modification time of any image."""
        lines: list[object] = [_VERSION, self.classes]
        for split, files in self.splits.items():
            for file in files:
                name = os.fsencode(file.path.relative_to(self.root)).hex()
                lines.append([split, name, file.size_bytes, file.changed_ns])
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def list_folder(root: Path) -> Listing:
    """Lists a folder of images.

    Args:
        root: the absolute path of the folder.

    Raises:
        ConfigError: there is no such folder, it cannot be read, or it is no folder of images.
        DataError: a class or a split has no images, or there are fewer than two classes.
    """
    try:
        folders = _split_folders(root)
        classes = tuple(_classes(folders["train"]))
        if not classes:
            raise ConfigError(f"{root} has no class folders: images belong in {root.name}/<class>/")
        if len(classes) < 2:
            raise DataError(f"{folders['train']} has one class only ({classes[0]}): at least two are needed")
        skipped, passed_over = Counter[str](), set[Path]()
        splits = {split: list(_image_files(folder, classes, skipped, passed_over)) for split, folder in folders.items()}
        for split, files in splits.items():
            if not files:  # as in the unlabeled test set of a competition
                raise DataError(
                    f"{folders[split]} has no class folders, so that its images have no labels: put them in "
                    f"{folders[split].name}/<class>/, or move the folder elsewhere"
                )
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} does not exist") from error
    except NotADirectoryError as error:
        raise ConfigError(f"{error.filename} is a file, not a folder of images") from error
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error
    unused = [] if folders["train"] == root else [name for name in _class_names(root) if name.lower() not in _SPLITS]
    notes = [f"{name} is not used: images are in {folders['train'].name}" for name in unused]
    notes += [_describe(skipped, "file", " skipped")] if skipped else []
    passed_over |= {path for folder in {root, *folders.values()} for path in _system_folders(folder)}
    names = Counter(path.name for path in sorted(passed_over))
    notes += [_describe(names, "folder", " of systems passed over")] if names else []
    return Listing(root, classes, splits, tuple(notes))


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each split. A flat folder is its own training split, even with a class named `train`."""
    names = _class_names(root)
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_SPLITS.get(name.lower(), ""), []).append(name)
    is_flat = not any(_class_names(root / name) for name in found.get("train", []))
    misnamed = [name for name in names if name.lower() in (*_UNSUPPORTED_SPLITS, *(_SPLITS if is_flat else ()))]
    misnamed = [name for name in misnamed if _holds_only_folders(root / name)]
    if misnamed:
        raise ConfigError(
            f"{root} has {' and '.join(misnamed)}, which look like splits of a data set, not like classes: name them "
            "train, val and test (train is required), or give another folder"
        )
    if is_flat:
        return {"train": root}
    for split in dict.fromkeys(_SPLITS.values()):
        if len(both := found.get(split, [])) > 1:
            raise ConfigError(f"{root} has both {both[0]} and {both[1]}: keep one")
    return {split: root / found[split][0] for split in dict.fromkeys(_SPLITS.values()) if split in found}


def _holds_only_folders(folder: Path) -> bool:
    """Returns whether a folder has folders and no images."""
    return bool(_class_names(folder)) and not any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())


def _class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_passed_over(entry.name))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Returns the folders of each class, in order. Names that differ in their Unicode form alone are one class.

    macOS writes an accented letter as a letter and an accent (NFD), most other systems as one character (NFC).
    """
    found: dict[str, list[Path]] = {}
    for name in _class_names(folder):
        found.setdefault(unicodedata.normalize("NFC", name), []).append(folder / name)
    return dict(sorted(found.items()))


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or _is_of_a_system(name)


def _is_of_a_system(name: str) -> bool:
    return name.casefold() in SYSTEM_FOLDERS


def _system_folders(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        yield from (Path(entry.path) for entry in entries if entry.is_dir() and _is_of_a_system(entry.name))


def _image_files(
    folder: Path, classes: tuple[str, ...], skipped: Counter[str], passed_over: set[Path]
) -> Iterator[ImageFile]:
    """Yields the images of a split.

    Args:
        folder: the split's folder.
        classes: the names of the classes.
        skipped: counts other files by their extension.
        passed_over: gets the folders of systems.
    """
    for name, own in _classes(folder).items():
        if name not in classes:
            raise DataError(f"{own[0]} is a class that the training images do not have")
        label = classes.index(name)
        images: list[ImageFile] = []
        others: Counter[str] = Counter()
        for path in sorted(path for each in own for path in _files_under(each, passed_over)):
            extension = path.suffix.lower()
            if extension not in EXTENSIONS:
                others[extension or "no extension"] += 1
            elif stat.S_ISREG((status := _status(path)).st_mode):
                images.append(ImageFile(path, label, status.st_size, status.st_mtime_ns))
            else:  # reading a pipe would block
                others["not a regular file"] += 1
        if not images:
            only = f", only {_describe(others, 'file')}" if others else ""
            extensions = ", ".join(EXTENSIONS)
            raise DataError(f"{own[0]} is an empty class: no image in it{only}; images are {extensions}")
        skipped += others
        yield from images


def _describe(counts: Counter[str], noun: str, what: str = "") -> str:
    number, kinds = counts.total(), [kind for kind, _ in counts.most_common(_NUM_LISTED)]
    more = ", …" if len(counts) > len(kinds) else ""
    return f"{number} {noun}{'s' if number > 1 else ''}{what} ({', '.join(kinds)}{more})"


def _files_under(folder: Path, passed_over: set[Path]) -> Iterator[Path]:
    """Yields the files under `folder`, through links, but each real folder once: a link may lead back up.

    Hidden files and folders and the folders of systems are left out: copies in `.ipynb_checkpoints` or thumbnails in
    `@eaDir` would get into both the training and the test split.
    """
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        passed_over.update(Path(where, name) for name in folders if _is_of_a_system(name))
        folders[:] = sorted(name for name in folders if not _is_passed_over(name))  # the first of several links wins
        yield from (Path(where, name) for name in files if not name.startswith("."))


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise error
