"""Makes and completes the index of a folder. What an older index knows about a file that is unchanged is taken over."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.folder.decode import examine_files
from trainer.data.folder.index import DECODED, FolderIndex, index_path, open_index, save_index
from trainer.data.folder.listing import Listing
from trainer.data.folder.probe import read_headers
from trainer.data.folder.workers import ImageProblem, list_some, map_in_threads
from trainer.data.mapped_file import DamagedFileError, discard
from trainer.data.staging import exclusive_folder
from trainer.errors import DataError, list_names

_KNOWLEDGE = ("extents", "flags", "largest", "file_sha256", "picture_sha256")


def open_or_make_index(listing: Listing, folder: Path, lock_path: Path, log: Callable[[str], None]) -> FolderIndex:
    """Opens the index of a listing; one process of this machine makes it first, from the headers of the files.

    Args:
        folder: that of the decoded files.
        lock_path: the lock file for writing there.
        log: receives each line for the user.

    Raises:
        DataError: the disk is full.
        ConfigError: the folder cannot be written.
    """
    with suppress(FileNotFoundError, DamagedFileError):
        return open_index(index_path(folder, listing.key))
    with exclusive_folder(folder, lock_path, log):
        return open_or_make_index_locked(listing, folder, log)


def open_or_make_index_locked(listing: Listing, folder: Path, log: Callable[[str], None]) -> FolderIndex:
    """Does the same for a caller that holds the lock."""
    path = index_path(folder, listing.key)
    try:
        return open_index(path)
    except FileNotFoundError:
        pass
    except DamagedFileError as error:
        log(f"{error}: reading the files again")
    save_index(_make_index(listing, folder, log), path)
    for older in set(folder.glob("*.index")) - {path}:
        discard(older)
        if not older.exists():
            for facts in folder.glob(f"*-{older.stem}-*.json"):
                facts.unlink(missing_ok=True)
    return open_index(path)


def complete_index(
    index: FolderIndex, lock_path: Path, log: Callable[[str], None], *, max_problems: int
) -> FolderIndex:
    """Decodes the files that no process has decoded yet; one process of this machine does so.

    Files that could not be decoded are tried again if there are more of them than `max_problems`: a disk that failed
    may be back.

    Returns:
        The index with the digests of all files.

    Raises:
        DataError: more files cannot be decoded, or the disk is full.
        ConfigError: the folder cannot be written.
    """
    path = index.path
    assert path is not None
    if not index.is_complete or len(index.problems) > max_problems:
        with exclusive_folder(path.parent, lock_path, log):
            with suppress(FileNotFoundError):
                index = open_index(path)  # another process may have completed it
            if not index.is_complete or len(index.problems) > max_problems:
                examine_files(index, log, lambda: save_index(index, path))
                save_index(index, path)
                log_warnings(index, log)
                index = open_index(path)
    check_problems(index, max_problems)
    return index


def check_problems(index: FolderIndex, max_problems: int) -> None:
    """Raises DataError if more files than `max_problems` cannot be decoded."""
    number = len(index.problems)
    if number > max_problems:
        problems = [index.problem(row) for row in sorted(index.problems)]
        raise DataError(
            f"{number} of {len(index)} images cannot be read: {list_some(problems)}; "
            f"--skip-bad-images {number} leaves them out"
        )


def find_changed(index: FolderIndex) -> list[str]:
    """Hashes the files of an index again, and returns a line about each that is not what it was."""

    def check(number: int, path: Path) -> str | None:
        row = rows[number]
        try:
            index.unchanged_file(row)
            if index.has_same_content(row, path):
                return None
        except (DataError, OSError) as error:
            return str(error)
        return f"{path} has other bytes than when it was indexed: restore it, or touch it to read it again"

    rows = np.flatnonzero(index.has(DECODED)).tolist()
    return [line for line in map_in_threads(check, map(index.file, rows)) if isinstance(line, str)]


def log_warnings(index: FolderIndex, log: Callable[[str], None]) -> None:
    """Logs what Pillow and `convoy.images` warn about."""
    if index.warnings:
        problems = [ImageProblem(index.file(row), text) for row, text in sorted(index.warnings.items())]
        log(f"warning: Pillow warns about {len(problems)} of {len(index)} images: {list_some(problems)}")


def _make_index(listing: Listing, folder: Path, log: Callable[[str], None]) -> FolderIndex:
    index = FolderIndex.of(listing)
    changes: list[str] = []
    for path in sorted(folder.glob("*.index"), key=_made_at):  # the newest last
        with suppress(FileNotFoundError, DataError):
            changes = _take_over(index, open_index(path))
    if changes:
        log(f"the folder has changed since it was last read: {', '.join(changes)}")
    read_headers(index)
    return index


def _made_at(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _take_over(index: FolderIndex, older: FolderIndex) -> list[str]:
    """Enters what an older index knows about files with the same name, size and modification time.

    Returns:
        What has changed since the older index, a part of a line for each kind of change.
    """
    _, rows, known = np.intersect1d(_states(index), _states(older), assume_unique=True, return_indices=True)
    for name in _KNOWLEDGE:
        getattr(index, name)[torch.from_numpy(rows)] = getattr(older, name)[torch.from_numpy(known)]
    if older.warnings:
        new_rows = dict(zip(known.tolist(), rows.tolist(), strict=True))
        index.warnings.update({new_rows[row]: text for row, text in older.warnings.items() if row in new_rows})
    now, before = _other_names(index, rows), _other_names(older, known)
    kinds = {"gone": before - now, "new": now - before, "changed": now & before}
    return [_describe_names(kind, names) for kind, names in kinds.items() if names]


def _other_names(index: FolderIndex, rows: npt.NDArray[np.int64]) -> set[bytes]:
    """Returns the names of the files that are in none of the rows."""
    return {index.name(row) for row in np.setdiff1d(np.arange(len(index)), rows).tolist()}


def _describe_names(kind: str, names: set[bytes]) -> str:
    return f"{len(names)} {kind} ({list_names([os.fsdecode(name) for name in sorted(names)])})"


def _states(index: FolderIndex) -> npt.NDArray[np.bytes_]:
    """Returns a digest of each file's name, size and modification time, 16 bytes each."""
    names, starts, ends = index.names.numpy().tobytes(), [0, *index.ends.tolist()], index.ends.tolist()
    files = zip(starts, ends, index.num_bytes.tolist(), index.changed_ns.tolist(), strict=False)
    digests = (
        hashlib.blake2b(b"%d %d %b" % (size, changed_ns, names[start:end]), digest_size=16).digest()
        for start, end, size, changed_ns in files
    )
    return np.fromiter(digests, "S16", len(index))
