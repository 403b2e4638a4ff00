"""Lists the classes and image files of a folder in torchvision's ImageFolder layout, without opening an image.

The layout is PATH/<class>/*.png, or PATH/train/<class>/* with, optionally, PATH/val (or valid, validation) and
PATH/test. Hidden folders and those that systems make are passed over at every level.
"""

import hashlib
import json
import os
import re
import stat
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from convoy.images import EXTENSIONS
from trainer.errors import ConfigError, DataError, list_names

_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""The split by the name of its folder, in lower case."""
_UNSUPPORTED_SPLITS = ("training", "dev", "testing")
"""Folder names that probably mean splits, but are not accepted as such."""
_PART = re.compile(r"(train|val|valid|validation|test|dev)(ing)?([^a-z].*)?", re.DOTALL | re.IGNORECASE)
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
_OWN_FOLDERS = {"runs": ("config.json", "study.json"), "models": ("config.pbtxt",)}
"""What Convoy makes where it is run, maybe among the classes, and files of which each folder in it has one."""
_NUM_LISTED = 5
_VERSION = 5
"""Version of the rules that put images into splits and write notes. A new one decodes every folder again."""


def changed_ns(status: os.stat_result) -> int:
    """Returns the time of a file's last modification, in nanoseconds; at the limit of 64 bits for one of the year 1601.

    A disk of Windows has such a time where it has none.
    """
    return min(max(status.st_mtime_ns, -(2**63)), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Files:
    """Image files in order, in 32 bytes each and their paths: a folder may have millions.

    Args:
        names: the files' paths within the folder, one after the other.
        ends: where each path ends in `names`.
        labels: the class of each file.
        sizes: in bytes.
        changed_ns: times of the last modification, in nanoseconds.
    """

    names: bytearray = field(default_factory=bytearray)
    ends: "array[int]" = field(default_factory=lambda: array("q"))
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    changed_ns: "array[int]" = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.ends)

    def add(self, name: bytes, label: int, status: os.stat_result) -> None:
        self.names.extend(name)
        self.ends.append(len(self.names))
        self.labels.append(label)
        self.sizes.append(status.st_size)
        self.changed_ns.append(changed_ns(status))

    def name(self, number: int) -> bytes:
        """Returns the path of a file within the folder."""
        return bytes(self.names[self.ends[number - 1] if number else 0 : self.ends[number]])


@dataclass(frozen=True, slots=True)
class Listing:
    """The classes and image files of a folder."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Files]
    notes: tuple[str, ...]
    """Lines for the user about files and folders that are not used."""
    key: str
    """16 hex digits that change with the name, size or modification time of any image."""

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))


def list_folder(root: Path) -> Listing:
    """Lists a folder of images.

    Args:
        root: the absolute path of the folder.

    Raises:
        ConfigError: there is no such folder, it cannot be read, or it is no folder of images.
        DataError: a class or a split has no images, or there are fewer than two classes.
    """
    skipped, passed_over = Counter[str](), set[Path]()
    with _explained():
        folders, classes = _layout(root)
        splits = {split: _list_split(root, folder, classes, skipped, passed_over) for split, folder in folders.items()}
        for split, files in splits.items():
            if not files:  # as in the unlabeled test set of a competition
                raise DataError(
                    f"{folders[split]} has no class folders, so that its images have no labels: put them in "
                    f"{folders[split].name}/<class>/, or move the folder elsewhere"
                )
        notes = tuple(_notes(root, folders, classes, skipped, passed_over))
    return Listing(root, classes, splits, notes, _key(classes, splits))


def check_folder(root: Path) -> None:
    """Checks that a path is a folder of images by its folders alone, which takes no time however many images it has.

    Raises:
        ConfigError: see `list_folder`.
        DataError: there are fewer than two classes.
    """
    with _explained():
        _layout(root)


@contextmanager
def _explained() -> Iterator[None]:
    """Context for code that lists folders: turns the errors of the system into lines for the user."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} does not exist") from error
    except NotADirectoryError as error:
        raise ConfigError(f"{error.filename} is a file, not a folder of images: unpack archives first") from error
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error


def _layout(root: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Returns the folder of each split, and the classes of the training images."""
    folders = _split_folders(root)
    return folders, _training_classes(root, folders["train"])


def _training_classes(root: Path, folder: Path) -> tuple[str, ...]:
    """Returns the classes of the training images, of which there are at least two."""
    own = _classes(folder)
    if len(own) < 2 and _num_images_in(folder):
        raise ConfigError(f"{root} holds images itself: give the folder that holds one folder for each class")
    if not own:
        raise ConfigError(f"{root} has no class folders: images belong in {root.name}/<class>/")
    if len(own) < 2:
        (only, *_) = next(iter(own.values()))
        is_wrapper = folder == root and _holds_only_folders(only)  # as unpacking an archive makes it
        hint = f"; if its folders are the classes, give {only}" if is_wrapper else ""
        raise DataError(f"{folder} has one class only ({only.name}): at least two are needed{hint}")
    return tuple(own)


def _notes(
    root: Path, folders: dict[str, Path], classes: tuple[str, ...], skipped: Counter[str], passed_over: set[Path]
) -> Iterator[str]:
    """Yields lines for the user about files and folders that are not used, or not as their names say."""
    if folders["train"] == root:
        for name in classes:
            if name.lower() in _SPLITS and name.lower() != "train":
                yield f"{name} is a class here; a part would be {name}/<class>/, beside train/<class>/"
    else:
        for name in _class_names(root):
            if name.lower() not in _SPLITS:
                yield f"{name} is not used: images are in {folders['train'].name}"
    yield from _warnings_of_case(classes)
    for folder in folders.values():
        if number := _num_images_in(folder):
            yield f"{number} image{'s are' if number > 1 else ' is'} in {folder} itself, in no class, and not used"
    if skipped:
        yield _describe(skipped, "file", " skipped")
    passed_over |= {path for folder in {root, *folders.values()} for path in _system_folders(folder)}
    if passed_over:
        kinds = Counter(path.name for path in sorted(passed_over))
        yield _describe(kinds, "folder", " of systems passed over")


def _warnings_of_case(classes: tuple[str, ...]) -> Iterator[str]:
    for _, names in groupby(sorted(classes, key=str.casefold), str.casefold):
        if len(alike := list(names)) > 1:
            yield f"warning: {' and '.join(alike)} are separate classes, whose names differ in case alone"


def _key(classes: tuple[str, ...], splits: dict[str, Files]) -> str:
    """Returns a digest of the JSON `[version, classes, [split, name in hex, size, time], …]`."""
    digest = hashlib.sha256(json.dumps([_VERSION, classes])[:-1].encode())
    for split, files in splits.items():
        start = 0
        for end, size, changed_ns in zip(files.ends, files.sizes, files.changed_ns, strict=True):
            digest.update(f', ["{split}", "{files.names[start:end].hex()}", {size}, {changed_ns}]'.encode())
            start = end
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each split. A flat folder is its own training split, even with a class named `train`."""
    names = _class_names(root)
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_SPLITS.get(name.lower(), ""), []).append(name)
    is_flat = not any(_class_names(root / name) for name in found.get("train", []))
    are_parts = is_flat and _are_parts(names)
    for name in names if are_parts else ():
        if _num_images_in(root / name):
            raise DataError(
                f"{root / name} has no class folders, so that its images have no labels (a table of them is not read): "
                "put those to train on into train/<class>/"
            )
    misnamed = [name for name in names if name.lower() in (*_UNSUPPORTED_SPLITS, *(_SPLITS if is_flat else ()))]
    misnamed = [name for name in (names if are_parts else misnamed) if _holds_only_folders(root / name)]
    if misnamed:
        raise ConfigError(
            f"{root} has {' and '.join(misnamed)}, whose folders look like classes: put the images to train on into "
            "train/<class>/; val/<class>/ and test/<class>/ are optional"
        )
    if is_flat:
        return {"train": root}
    for split in dict.fromkeys(_SPLITS.values()):
        if len(both := found.get(split, [])) > 1:
            raise ConfigError(f"{root} has both {both[0]} and {both[1]}: keep one")
    return {split: root / found[split][0] for split in dict.fromkeys(_SPLITS.values()) if split in found}


def _are_parts(names: list[str]) -> bool:
    """Returns whether the names are those of parts, such as `train` and `test1`, or `train` alone; no classes are."""
    parts = {match[1].lower() if (match := _PART.fullmatch(name)) else "" for name in names}
    return "" not in parts and "train" in parts and (len(parts) > 1 or len(names) == 1)


def _holds_only_folders(folder: Path) -> bool:
    """Returns whether a folder has folders and no images."""
    return bool(_class_names(folder)) and not _num_images_in(folder)


def _num_images_in(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(
            _extension(entry.name) in EXTENSIONS and entry.name[0] != "." and entry.is_file() for entry in entries
        )


def _class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not _is_passed_over(entry.path) and _is_folder(entry))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Returns whether an entry is a folder, or a link to one.

    Raises:
        DataError: it is a link to nothing, as to a disk that is not mounted: it may have been a class or the test set.
    """
    return stat.S_ISDIR(_status(entry.path).st_mode) if entry.is_symlink() else entry.is_dir()


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Returns the folders of each class, in order. Names that differ in their Unicode form alone are one class.

    macOS writes an accented letter as a letter and an accent (NFD), most other systems as one character (NFC).
    """
    found: dict[str, list[Path]] = {}
    for name in _class_names(folder):
        found.setdefault(unicodedata.normalize("NFC", name), []).append(folder / name)
    return dict(sorted(found.items()))


def _is_passed_over(path: str) -> bool:
    return os.path.basename(path).startswith(".") or _is_of_a_system(path)


def _is_of_a_system(path: str) -> bool:
    """Returns whether a path is that of a folder that systems make, or Convoy itself: `runs` and `models`."""
    name = os.path.basename(path)
    if name in _OWN_FOLDERS and os.path.isdir(path):
        with os.scandir(path) as entries:
            return any(os.path.exists(f"{own.path}/{file}") for own in entries for file in _OWN_FOLDERS[name])
    return name.casefold() in SYSTEM_FOLDERS


def _system_folders(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        yield from (Path(entry.path) for entry in entries if entry.is_dir() and _is_of_a_system(entry.path))


def _list_split(
    root: Path, folder: Path, classes: tuple[str, ...], skipped: Counter[str], passed_over: set[Path]
) -> Files:
    """Returns the images of a split.

    Args:
        root: the whole folder.
        folder: the split's folder.
        classes: the names of the classes.
        skipped: counts other files by their extension.
        passed_over: gets the folders of systems.
    """
    files, labels, start = Files(), {name: label for label, name in enumerate(classes)}, len(f"{root}".rstrip("/")) + 1
    for name, own in _classes(folder).items():
        if name not in labels:
            theirs = list_names(classes, _NUM_LISTED)
            raise DataError(f"{own[0]} is a class that the training images do not have; theirs are {theirs}")
        num_before, others = len(files), Counter[str]()
        paths = (path for each in own for path in _files_under(each, passed_over))
        for path in sorted(paths, key=lambda path: path.replace("/", "\0")):  # in the order of names, folder by folder
            extension = _extension(path)
            if extension not in EXTENSIONS:
                others[extension or "no extension"] += 1
            elif stat.S_ISREG((status := _status(path)).st_mode):
                files.add(os.fsencode(path[start:]), labels[name], status)
            else:  # reading a pipe would block
                others["not a regular file"] += 1
        if len(files) == num_before:
            only = f", only {_describe(others, 'file')}" if others else ""
            extensions = ", ".join(EXTENSIONS)
            raise DataError(f"{own[0]} is an empty class: no image in it{only}; images are {extensions}")
        skipped += others
    return files


def _describe(counts: Counter[str], noun: str, what: str = "") -> str:
    number, kinds = counts.total(), [kind for kind, _ in counts.most_common()]
    return f"{number} {noun}{'s' if number > 1 else ''}{what} ({list_names(kinds, _NUM_LISTED)})"


def _extension(path: str) -> str:
    """Returns the end of a file's name from its last dot, in lower case; nothing for `name` and `.name`."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def _files_under(folder: Path, passed_over: set[Path]) -> Iterator[str]:
    """Yields the files under `folder`, through links, but each real folder once, and none that holds `folder`.

    Hidden files and folders and the folders of systems are left out: copies in `.ipynb_checkpoints` or thumbnails in
    `@eaDir` would get into both the training and the test split.
    """
    seen = {str(path) for path in Path(os.path.realpath(folder)).parents}  # a link up leads to the other classes
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        passed_over.update(Path(where, name) for name in folders if _is_of_a_system(f"{where}/{name}"))
        folders[:] = sorted(name for name in folders if not _is_passed_over(f"{where}/{name}"))  # the first link wins
        yield from (f"{where}/{name}" for name in files if not name.startswith("."))


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            raise DataError(f"{path} is a link to nothing: remove it, or restore what it leads to") from error
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise error
