"""The index of a folder of images: what is known about each file, in arrays that every process maps.

An index belongs to one state of a folder: the names, sizes and modification times of its files. It holds the class,
the split and the header of each file, and the digests of its bytes and of its picture, in about 150 bytes. This
module does not know how they are found out; `indexing` does.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.folder.listing import Listing, changed_ns
from trainer.data.folder.workers import ImageProblem
from trainer.data.mapped_file import DamagedFileError, map_tensors, share_lock, write_tensors
from trainer.errors import DataError
from trainer.files import sha256_of_file

GREY, SIXTEEN_BITS, UPPER_BITS, PROBED, DECODED = 1, 2, 4, 8, 16
"""Flags of a file: grey; 16 bits in each channel; of which Pillow has the upper 8 only; header read; decoded."""

SPLITS = ("train", "validation", "test")
_LAYOUT = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FolderIndex:
    """What is known about the files of a folder, in the order of its listing.

    Args:
        root: the folder.
        key: of the listing.
        notes: of the listing.
        names: uint8, the files' paths within the folder, one after the other.
        ends: int64 [N], where each path ends in `names`.
        splits: uint8 [N], positions in `SPLITS`, of the folders that the files are in.
        labels: int64 [N].
        num_bytes: int64 [N], the sizes of the files.
        changed_ns: int64 [N], the times of their last modification.
        extents: int32 [N, 2], height and width of the image, upright if the file has been decoded.
        flags: uint8 [N].
        largest: int32 [N], the largest value of an image of 16 bits; 0 for others.
        file_sha256: uint8 [N, 32], of the bytes of a decoded file.
        picture_sha256: uint8 [N, 32], of the upright pixels of a decoded file.
        problems: why files cannot be decoded.
        warnings: of Pillow and of `convoy.images`.
        path: the file of the index; None before it is saved.
    """

    root: Path
    classes: tuple[str, ...]
    key: str
    notes: tuple[str, ...]
    names: torch.Tensor
    ends: torch.Tensor
    splits: torch.Tensor
    labels: torch.Tensor
    num_bytes: torch.Tensor
    changed_ns: torch.Tensor
    extents: torch.Tensor
    flags: torch.Tensor
    largest: torch.Tensor
    file_sha256: torch.Tensor
    picture_sha256: torch.Tensor
    problems: dict[int, str] = field(default_factory=dict)
    warnings: dict[int, str] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def of(cls, listing: Listing) -> "FolderIndex":
        """Returns the index of a listing, in which nothing is known about the content of the files."""
        all_files, number = list(listing.splits.values()), len(listing)
        starts = np.cumsum([0, *(len(files.names) for files in all_files)])
        ends = [np.array(files.ends, np.int64) + start for files, start in zip(all_files, starts, strict=False)]
        splits = [np.full(len(files), SPLITS.index(split), np.uint8) for split, files in listing.splits.items()]
        return cls(
            root=listing.root,
            classes=listing.classes,
            key=listing.key,
            notes=listing.notes,
            names=torch.from_numpy(np.frombuffer(b"".join(files.names for files in all_files), np.uint8).copy()),
            ends=torch.from_numpy(np.concatenate(ends)),
            splits=torch.from_numpy(np.concatenate(splits)),
            labels=torch.from_numpy(np.concatenate([np.array(files.labels, np.int64) for files in all_files])),
            num_bytes=torch.from_numpy(np.concatenate([np.array(files.sizes, np.int64) for files in all_files])),
            changed_ns=torch.from_numpy(np.concatenate([np.array(files.changed_ns, np.int64) for files in all_files])),
            extents=torch.zeros(number, 2, dtype=torch.int32),
            flags=torch.zeros(number, dtype=torch.uint8),
            largest=torch.zeros(number, dtype=torch.int32),
            file_sha256=torch.zeros(number, 32, dtype=torch.uint8),
            picture_sha256=torch.zeros(number, 32, dtype=torch.uint8),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path alone: another process maps the file."""
        if self.path is None:
            raise TypeError("an index that has no file cannot be pickled")
        return partial(open_index, verify=False), (self.path,)

    def name(self, row: int) -> bytes:
        """Returns the path of a file within the folder."""
        ends = self.ends.numpy()
        return self.names.numpy()[ends[row - 1] if row else 0 : ends[row]].tobytes()

    def file(self, row: int) -> Path:
        """Returns the path of a file."""
        return self.root / os.fsdecode(self.name(row))

    def unchanged_file(self, row: int) -> Path:
        """Returns the path of a file that is what it was when the folder was listed.

        Raises:
            DataError: the file is gone, cannot be read or has changed.
        """
        path = self.file(row)
        with _explain_errors(path):
            self._check_unchanged(row, path, os.stat(path))
        return path

    def read_unchanged_file(self, row: int) -> tuple[Path, bytes]:
        """Returns the path of a file that is what it was when the folder was listed, and its content.

        Raises:
            DataError: the file is gone, cannot be read or has changed.
        """
        path = self.file(row)
        # Path.read_bytes makes more system calls, and each gives up Python's lock, for which other decoders wait.
        with _explain_errors(path):
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe in its place must not block
            try:
                status = os.fstat(file)
                self._check_unchanged(row, path, status)
                data = os.read(file, status.st_size)
                while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
                    data += more
            finally:
                os.close(file)
        return path, data

    def _check_unchanged(self, row: int, path: Path, status: os.stat_result) -> None:
        # NumPy's elements: torch gives up Python's lock for each of its own.
        if status.st_size == self.num_bytes.numpy()[row]:
            if changed_ns(status) == self.changed_ns.numpy()[row]:
                return
            if self.has_same_content(row, path):  # a copy of the file, or a disk with coarse times
                return
        raise DataError(f"{path} has changed since the data set was opened: restore it, or train anew")

    def has_same_content(self, row: int, path: Path) -> bool:
        """Returns whether a file has the bytes that it had when it was decoded. Reads the whole file."""
        known: bytes = self.file_sha256.numpy()[row].tobytes()
        return known == bytes.fromhex(sha256_of_file(path))

    def has(self, flag: int) -> npt.NDArray[np.bool_]:
        """Returns whether each file has a flag, [N]."""
        found: npt.NDArray[np.bool_] = (self.flags.numpy() & flag) != 0
        return found

    def problem(self, row: int) -> ImageProblem:
        return ImageProblem(self.file(row), self.problems.get(row, "it has not been decoded"))

    @property
    def num_channels(self) -> int:
        """1 if all images are grey, else 3."""
        return 1 if bool(self.has(GREY)[self.has(PROBED)].all()) else 3

    @property
    def is_complete(self) -> bool:
        """Whether each file has been decoded, or cannot be."""
        return int(self.has(DECODED).sum()) + len(self.problems) == len(self)


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path} is gone since the data set was opened: put it back, or train anew") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def index_path(folder: Path, key: str) -> Path:
    """Returns the file of an index.

    Args:
        folder: that of the decoded files.
        key: of the listing.
    """
    return folder / f"{key}.index"


_TENSORS = (
    *("names", "ends", "splits", "labels", "num_bytes", "changed_ns"),
    *("extents", "flags", "largest", "file_sha256", "picture_sha256"),
)


def save_index(index: FolderIndex, path: Path) -> None:
    """Writes an index atomically, into an existing folder.

    Raises:
        DataError: the disk is full.
        ConfigError: the folder cannot be written.
    """
    payload: dict[str, Any] = {
        "layout": _LAYOUT,
        "root": str(index.root),
        "classes": list(index.classes),
        "key": index.key,
        "notes": list(index.notes),
        "problems": dict(index.problems),
        "warnings": dict(index.warnings),
        **{name: getattr(index, name) for name in _TENSORS},
    }
    payload["sha256"] = _digest(payload)
    write_tensors(payload, path, sum(getattr(index, name).nbytes for name in _TENSORS))


def open_index(path: Path, *, verify: bool = True) -> FolderIndex:
    """Maps an index. `mapped_file.discard` leaves it alone while it is in use.

    Args:
        verify: hashes the content, at about 1.4 GB/s, and compares it with the recorded digest.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is not what was written.
        DataError: the file cannot be opened or mapped.
    """
    payload = map_tensors(path)
    try:
        if payload["layout"] != _LAYOUT:
            raise DamagedFileError(f"{path} is of another version of Convoy")
        recorded = payload.pop("sha256")
        if verify and _digest(payload) != recorded:
            raise DamagedFileError(f"{path} is damaged (its content does not match its digest)")
        index = FolderIndex(
            root=Path(payload["root"]),
            classes=tuple(payload["classes"]),
            key=payload["key"],
            notes=tuple(payload["notes"]),
            problems=payload["problems"],
            warnings=payload["warnings"],
            path=path,
            **{name: payload[name] for name in _TENSORS},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged (not an index of images)") from error
    share_lock(path, index.names)
    return index


def _digest(payload: dict[str, Any]) -> str:
    """Returns the SHA-256 of the content of an index's file."""
    digest = hashlib.sha256()
    for name, value in payload.items():
        digest.update(f"{name} ".encode())
        digest.update(value.numpy().data if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()
