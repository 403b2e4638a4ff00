"""`python -m trainer data list|fetch|verify|import`: manages the data sets on this machine."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from convoy.options import option, parse_options
from convoy.verbs import Verb, run_verb
from trainer.config import SourceChoice
from trainer.data.content import Dataset
from trainer.data.datasets import DATASETS, dataset_info, decoded_path, load_dataset, open_or_fetch
from trainer.data.decoded_file import DecodedDataset, check_digest, open_decoded, write_decoded
from trainer.data.folder.image_folder import decoded_folder
from trainer.data.folder.index import open_index
from trainer.data.folder.indexing import find_changed
from trainer.data.folder.listing import check_folder
from trainer.data.folder.options import FolderOptions
from trainer.data.folder.splits import split_rows
from trainer.data.mapped_file import DamagedFileError
from trainer.data.published.fetch import import_dataset
from trainer.data.published.progress import download_progress
from trainer.data.staging import exclusive_folder
from trainer.errors import ConfigError, DataError, list_names
from trainer.paths import FOLDER_PREFIX, default_data_dir, expand_home, full_name, image_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ListDatasets:
    """Lists the data sets, and shows which of them are on this machine.

    To use your own images, name the data set folder:PATH. Its layout is PATH/<class>/*.png (or jpg, webp, gif, …), or
    PATH/train/<class>/* with, optionally, PATH/val/<class>/* and PATH/test/<class>/*. Without a test folder about one
    image in ten of each class is held out for testing. The content of an image decides, so that it stays held out when
    images are added, renamed or removed.
    """

    data_dir: Path = field(default_factory=default_data_dir)
    """Folder that holds the data sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchDatasets:
    """Downloads data sets, verifies their digests and decodes them."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, option("NAME ...")] = ()
    """Names of data sets, or folder:PATH."""
    image_size: Annotated[int | None, option("PIXELS", "the images' own size")] = None
    """Width and height to which the images of a folder are resized."""
    source: SourceChoice = "auto"
    """resident: decode the images of a folder into one file. streamed: index them. auto: as a training on the CPU."""
    skip_bad_images: int = 0
    """Leave out files of a folder that cannot be decoded, up to so many."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder that holds the data sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyDatasets:
    """Verifies the digests of the data sets on this machine. Exits with 3 if one is damaged or missing."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, option("[NAME ...]", "all that are on this machine")] = ()
    """Names of data sets, or folder:PATH."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder that holds the data sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportDataset:
    """Decodes a published data set from files that you have, after verifying their digests. The files stay as they are.

    Your own images need no import: use folder:PATH as the name of the data set.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the data set."""
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Folder or archive (.tar, .tgz, .tar.xz, .tar.bz2, .zip, .gz, .npz) that contains the published files."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder that holds the data sets."""


def run(arguments: Sequence[str], prog: str = "python -m trainer data") -> int:
    """Parses the command line and runs the command.

    Args:
        arguments: the command line without the program's name.
        prog: the program's name, for the help.

    Returns:
        The exit code.

    Raises:
        TrainerError: the command fails.
    """
    return run_verb(prog, {name: _verb(f"{prog} {name}", *entry) for name, entry in COMMANDS.items()}, arguments)


def _verb(prog: str, kind: type[Any], run: Callable[[Any], int | None], summary: str) -> Verb:
    def command(arguments: Sequence[str]) -> int | None:
        config = parse_options(kind, arguments, prog=prog)
        return run(replace(config, data_dir=expand_home(config.data_dir)))

    return Verb(summary, command)


def list_datasets(command: ListDatasets) -> None:
    """Prints a row for each data set that has a name, and for each decoded folder."""
    header = ("name", "classes", "train", "test", "image", "size", "where")
    rows: list[tuple[str, ...]] = []
    for info in DATASETS.values():
        path = decoded_path(info, command.data_dir)
        shape = "x".join(map(str, info.image_shape))
        where = str(path) if os.path.exists(path) else "made at first use" if info.generate else "not fetched"
        counts = (str(len(info.classes)), str(info.num_train), str(info.num_test))
        rows.append((info.name, *counts, shape, f"{info.size_bytes / 1e6:.1f} MB", where))
    rows.extend(row for _path, row in _folder_rows(command.data_dir))
    _print_table(header, rows)


def fetch_datasets(command: FetchDatasets) -> None:
    """Fetches each data set, with a progress bar on a terminal.

    Raises:
        ConfigError: there is no name, or a wrong one, or a path of no folder of images; nothing is fetched.
        DataError: a data set cannot be fetched.
    """
    if not command.names:
        raise ConfigError(f"name the data sets to fetch: {', '.join(DATASETS)} or {FOLDER_PREFIX}PATH")
    for name in command.names:  # all names first: a typo in the last one must not cost a download
        if (root := image_folder(name)) is not None:
            check_folder(root)
        else:
            dataset_info(name, command.image_size)
    options = FolderOptions(
        image_size=command.image_size, source=command.source, skip_bad_images=command.skip_bad_images
    )
    with download_progress() as (log, progress):
        for name in command.names:
            opened: Dataset | DecodedDataset  # until the line is logged: other processes keep its file until then
            if name.startswith(FOLDER_PREFIX):
                opened = load_dataset(name, command.data_dir, options, log=log)
            else:
                opened = open_or_fetch(dataset_info(name), command.data_dir, log=log, progress=progress)
            assert opened.path is not None
            log(f"{name}: ready, {opened.path.stat().st_size / 1e6:.1f} MB in {opened.path}")


def verify_datasets(command: VerifyDatasets) -> int:
    """Prints a line for each data set, and returns 3 if one is damaged or missing or there is none, else 0."""
    exit_code, name = 0, ""
    for name, path, expected in list(_to_verify(command)):  # all names first, for a typo in the last one
        try:
            if path.suffix == ".index":
                exit_code = _verify_streamed(name, path) or exit_code
                continue
            decoded = open_decoded(path, expected_sha256=expected)
        except FileNotFoundError:
            if expected is None:  # another process has read the folder anew meanwhile
                continue
            print(f"{name}: not fetched")
            exit_code = DataError.exit_code
        except DamagedFileError as error:
            again = "its next use decodes it again"
            repair = again if expected is None else f"repair it with convoy data fetch {name}"
            print(f"{name}: DAMAGED: {error}; {repair}")
            exit_code = DataError.exit_code
        else:
            print(f"{name}: good, sha256 {decoded.sha256}")
    if not name:
        print(f"{command.data_dir}: no data set to verify")
        exit_code = DataError.exit_code
    return exit_code


def import_files(command: ImportDataset) -> None:
    """Decodes a data set from the user's files.

    Raises:
        ConfigError: there is no such data set or path.
        DataError: the data set's files are not all there.
    """
    if image_folder(command.name) is not None:
        raise ConfigError(f"{command.name} needs no import: give the name to convoy data fetch, or to a training")
    info = dataset_info(command.name)
    if info.generate is not None:
        raise ConfigError(f"{info.name} comes with the package: there is nothing to import")
    if not os.path.exists(command.path):  # False, too, for a path that may not be read
        raise ConfigError(f"{command.path} does not exist")
    path = decoded_path(info, command.data_dir)
    with exclusive_folder(path.parent, command.data_dir / f"{info.name}.lock", print):
        content = import_dataset(info, command.path, command.data_dir)
        check_digest(content, info.sha256)
        write_decoded(content, path)
    print(f"{info.name}: taken from {command.path}, verified, {path.stat().st_size / 1e6:.1f} MB in {path}")


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int | None], str]] = {
    "list": (ListDatasets, list_datasets, "list the data sets, and which of them are on this machine"),
    "fetch": (FetchDatasets, fetch_datasets, "download data sets, verify their digests and decode them"),
    "verify": (VerifyDatasets, verify_datasets, "verify the digests of the data sets on this machine"),
    "import": (ImportDataset, import_files, "decode a published data set from files that you have"),
}


def _to_verify(command: VerifyDatasets) -> Iterator[tuple[str, Path, str | None]]:
    """Yields the name, the decoded file and the published digest of each data set to verify."""
    if not command.names:
        for info in DATASETS.values():
            if os.path.exists(path := decoded_path(info, command.data_dir)):
                yield info.name, path, info.sha256
        yield from ((row[0], path, None) for path, row in _folder_rows(command.data_dir))
    for name in command.names:
        root = image_folder(name)
        if root is None:
            info = dataset_info(name)
            yield name, decoded_path(info, command.data_dir), info.sha256
            continue
        folder = decoded_folder(root, command.data_dir)
        paths = sorted(folder.glob("*.pt")) + [
            path for path in _streamed_folders(command.data_dir) if path.parent == folder
        ]
        if not paths:
            raise ConfigError(f"{name} has not been decoded yet: there is nothing to verify")
        yield from ((full_name(name), path, None) for path in paths)


def _folder_rows(data_dir: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yields the file of each decoded or streamed folder, with its row in the list."""
    decoded = sorted((data_dir / "folders").glob("*/*.pt"))
    for paths, row in ((decoded, _decoded_row), (_streamed_folders(data_dir), _streamed_row)):
        for path in paths:
            with suppress(FileNotFoundError):  # another process has read the folder anew meanwhile
                yield path, row(path)


def _streamed_folders(data_dir: Path) -> list[Path]:
    """Returns the indexes of folders that were streamed."""
    paths = sorted((data_dir / "folders").glob("*/*.index"))
    return [path for path in paths if any(path.parent.glob(f"*-{path.stem}-*.json"))]


def _streamed_row(path: Path) -> tuple[str, ...]:
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    try:
        index = open_index(path)
        rows = split_rows(index)
    except DataError:
        return f"{FOLDER_PREFIX}{path}", "", "", "", "", size, f"{path} (damaged)"
    counts = (str(len(index.classes)), str(len(rows["train"])), str(len(rows["test"])))
    return f"{FOLDER_PREFIX}{index.root}", *counts, "streamed", size, str(path)


def _verify_streamed(name: str, path: Path) -> int:
    """Prints a line about a streamed folder, and returns the exit code."""
    try:
        changed = find_changed(open_index(path))
    except DamagedFileError as error:
        changed = [f"{error}; its next use makes it again"]
    if changed:
        print(f"{name}: DAMAGED: {list_names(changed, 1)}")
        return DataError.exit_code
    print(f"{name}: good, all files are as they were indexed")
    return 0


def _decoded_row(path: Path) -> tuple[str, ...]:
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    try:
        content = open_decoded(path, verify=False).content
    except DataError:
        return f"{FOLDER_PREFIX}{path}", "", "", "", "", size, f"{path} (damaged)"
    counts = (str(len(content.classes)), str(len(content.train)), str(len(content.test)))
    shape = "x".join(map(str, content.train.images.shape[1:]))
    return content.name, *counts, shape, size, str(path)


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for title in header:  # names and paths are folded, not cut short: they are there to be copied
            table.add_column(title, overflow="fold", no_wrap=title not in ("name", "where"))
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
