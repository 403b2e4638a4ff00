"""`python -m trainer data list|fetch|verify|import`: data sets on this machine, without a training run."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from trainer.data.datasets import (
    NAMED_SETS,
    decoded_path,
    load_dataset,
    load_named,
    named_set,
)
from trainer.data.folder.image_folder import decoded_place
from trainer.data.published.download import DownloadProgress
from trainer.data.published.fetch import import_files
from trainer.data.store import (
    DamagedFile,
    Decoded,
    check_digest,
    explain_disk_errors,
    hold_lock,
    open_decoded,
    remove_stale,
    write_decoded,
)
from trainer.errors import ConfigError, DataError
from trainer.paths import FOLDER_PREFIX, default_data_dir, full_name, image_folder

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListSets:
    """Shows the data sets that there are, and which of them are on this machine.

    Besides these, folder:PATH takes your own images: PATH/<class>/*.png (jpg, webp, gif, ...), or
    PATH/train/<class>/* with, if you like, PATH/val and PATH/test. Without a test folder about one image in ten
    of each class is held out, by its file's content: it stays held out whatever is added, renamed or removed.
    """

    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSets:
    """Fetches data sets, verifies them by digest and decodes them."""

    names: tyro.conf.Positional[Names]
    """Names of data sets, or folder:PATH."""
    image_size: int | None = None
    """Width and height to which images are resized; for folders only."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySets:
    """Hashes data sets on this machine anew; leaves with status 3 when one is damaged or missing."""

    names: tyro.conf.Positional[Names] = ()
    """Names of data sets; all that are there when none is given."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSet:
    """Takes a data set from files at hand, verified by digest, and leaves them as they are."""

    name: tyro.conf.Positional[str]
    """Name of the data set."""
    path: tyro.conf.Positional[Path]
    """A folder, or an archive (.tar, .tgz, .tar.xz, .tar.bz2, .zip, .gz, .npz), with the published files in it."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""


Command = (
    Annotated[ListSets, tyro.conf.subcommand("list")]
    | Annotated[FetchSets, tyro.conf.subcommand("fetch")]
    | Annotated[VerifySets, tyro.conf.subcommand("verify")]
    | Annotated[ImportSet, tyro.conf.subcommand("import")]
)


def run(arguments: Sequence[str], prog: str = "python -m trainer data") -> int:
    """The verb: reads its arguments and does it. Returns the exit status; raises TrainerError."""
    command: ListSets | FetchSets | VerifySets | ImportSet = tyro.cli(
        Command,
        args=arguments,
        prog=prog,
        description="Data sets: list, fetch, verify, import.",
    )
    match command:
        case ListSets():
            list_sets(command)
        case FetchSets():
            fetch_sets(command)
        case VerifySets():
            return verify_sets(command)
        case ImportSet():
            import_set(command)
    return 0


def list_sets(command: ListSets) -> None:
    """Prints a row for each named set and each decoded folder."""
    header = ("name", "classes", "train", "test", "image", "size", "where")
    rows: list[tuple[str, ...]] = []
    for named in NAMED_SETS.values():
        path = decoded_path(named, command.data_dir)
        shape = "x".join(map(str, named.image_shape))
        where = str(path) if path.exists() else "made when asked for" if named.make else "not fetched"
        counts = (str(len(named.classes)), str(named.num_train), str(named.num_test))
        rows.append((named.name, *counts, shape, f"{named.size_bytes / 1e6:.1f} MB", where))
    rows.extend(_folder_row(path) for path in _folder_files(command.data_dir))
    _print_table(header, rows)


def fetch_sets(command: FetchSets) -> None:
    """Fetches each named set, with a progress bar on a terminal. Raises DataError where one cannot be."""
    if not command.names:
        raise ConfigError(f"name what to fetch: {', '.join(NAMED_SETS)} or {FOLDER_PREFIX}PATH")
    for name in command.names:
        if not name.startswith(FOLDER_PREFIX):
            named_set(name, command.image_size)  # all names first: a slip in the last must not cost a download
    with _progress() as (say, progress):
        for name in command.names:
            if name.startswith(FOLDER_PREFIX):
                path = load_dataset(name, command.data_dir, image_size=command.image_size, say=say).path
                assert path is not None
            else:
                path = load_named(named_set(name), command.data_dir, say=say, progress=progress).path
            say(f"{name}: ready, {path.stat().st_size / 1e6:.1f} MB in {path}")


def verify_sets(command: VerifySets) -> int:
    """Prints a line for each set; returns 3 when one is damaged or missing, or there is none, else 0."""
    status, name = 0, ""
    for name, path, expected in _to_verify(command):
        try:
            decoded = open_decoded(path, expected_sha256=expected)
        except FileNotFoundError:
            print(f"{name}: not fetched")
            status = DataError.exit_code
        except DamagedFile as error:
            again = "it is decoded anew when used" if expected is None else f"python -m trainer data fetch {name}"
            print(f"{name}: DAMAGED: {error}; made again by: {again}")
            status = DataError.exit_code
        else:
            print(f"{name}: good, sha256 {decoded.sha256}")
    if not name:
        print(f"{command.data_dir}: no data set to verify")
        status = DataError.exit_code
    return status


def import_set(command: ImportSet) -> None:
    """Decodes a set from the user's files. Raises ConfigError for a wrong path, DataError for wrong files."""
    named = named_set(command.name)
    if named.make is not None:
        raise ConfigError(f"{named.name} comes with the package: there is nothing to import")
    if not command.path.exists():
        raise ConfigError(f"{command.path} does not exist")
    path = decoded_path(named, command.data_dir)
    with explain_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(command.data_dir / f"{named.name}.lock", print) as keeps_out:
            if keeps_out:
                remove_stale(path.parent)
            content = import_files(named, command.path, command.data_dir)
            check_digest(content, named.sha256)
            write_decoded(content, path)
    print(f"{named.name}: taken from {command.path}, verified, {path.stat().st_size / 1e6:.1f} MB in {path}")


def _to_verify(command: VerifySets) -> Iterator[tuple[str, Path, str | None]]:
    """Name, decoded file and pinned digest of each set that is to be verified."""
    if not command.names:
        for named in NAMED_SETS.values():
            if (path := decoded_path(named, command.data_dir)).exists():
                yield named.name, path, named.sha256
        yield from ((_folder_name(path), path, None) for path in _folder_files(command.data_dir))
    for name in command.names:
        root = image_folder(name)
        if root is None:
            named = named_set(name)
            yield name, decoded_path(named, command.data_dir), named.sha256
            continue
        paths = sorted(decoded_place(root, command.data_dir).glob("*.pt"))
        if not paths:
            raise ConfigError(f"{name} has not been decoded yet: there is nothing to verify")
        yield from ((full_name(name), path, None) for path in paths)


def _folder_files(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "folders").glob("*/*.pt"))


def _open_folder(path: Path) -> Decoded | None:
    try:
        return open_decoded(path, verify=False)
    except (DataError, FileNotFoundError):
        return None


def _folder_name(path: Path) -> str:
    decoded = _open_folder(path)
    return decoded.content.name if decoded else f"{FOLDER_PREFIX}{path}"


def _folder_row(path: Path) -> tuple[str, ...]:
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    decoded = _open_folder(path)
    if decoded is None:
        return _folder_name(path), "", "", "", "", size, f"{path} (damaged)"
    content = decoded.content
    counts = (str(len(content.classes)), str(len(content.train)), str(len(content.test)))
    shape = "x".join(map(str, content.train.images.shape[1:]))
    return content.name, *counts, shape, size, str(path)


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for title in header:  # a path that is cut short could not be copied
            table.add_column(title, overflow="fold", no_wrap=title not in ("name", "where"))
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], DownloadProgress | None]]:
    """What says lines, and what shows downloads: a bar on a terminal, else a line now and then."""
    if not sys.stdout.isatty():
        yield print, None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, num_bytes: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name)
            bars.update(tasks[name], completed=num_bytes, total=total)

        yield lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True), show
