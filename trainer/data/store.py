"""The decoded file: one per data set and machine, written atomically, mapped by every process.

Plain tensors in torch's own format, opened with `mmap=True` and `weights_only=True`: pages are shared between
all processes of a host, so memory does not grow with the number of ranks. This module knows files, locks and
digests, and nothing of where images come from.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from trainer.data.statistics import pixel_statistics
from trainer.errors import ConfigError, DataError
from trainer.files import flush_to_disk, locked, save_tensors

Say = Callable[[str], None]
"""Takes one finished line for the user."""

TEMPORARY_PREFIX = ".tmp-"
_LAYOUT = 2
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
"""ENOENT: in /proc and the like no folder can be made, and that is what the kernel says."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images, uint8 [N, C, H, W], and labels, int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Content:
    """A whole data set in memory (or mapped): what a decoded file holds."""

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    validation: ImageSet | None = None
    notes: tuple[str, ...] = ()
    """Lines for whoever uses it, now and later: what was left out, or stands in two parts."""

    def parts(self) -> dict[str, ImageSet]:
        """Parts by name, in the order in which they are hashed; validation only where there is one."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True, slots=True)
class Decoded:
    """An opened decoded file: mapped content, its digest and where it lies.

    `mean` and `std` are those of the training images' channels, 0 to 255, taken once when they were decoded.
    """

    content: Content
    sha256: str
    path: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]


class DamagedFile(DataError):
    """A decoded file that cannot be what was written; `open_or_make` sets it aside and makes it again."""


def content_digest(content: Content) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes, in a fixed order and without copies."""
    digest = hashlib.sha256()
    for name, part in content.parts().items():
        for field, tensor in (("images", part.images), ("labels", part.labels)):
            header = f"{name}.{field} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n"
            digest.update(header.encode())
            if tensor.numel():
                digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def write_decoded(content: Content, path: Path) -> None:
    """Writes `content` to `path` by way of a temporary file: complete under its name, or not there at all.

    Raises DataError when the disk is full.
    """
    payload: dict[str, Any] = {
        "layout": _LAYOUT,
        "name": content.name,
        "classes": list(content.classes),
        "sha256": content_digest(content),
        "pixel_statistics": pixel_statistics(content.train.images),
        "notes": list(content.notes),
    }
    for name, part in content.parts().items():
        payload[f"{name}_images"] = _whole(part.images)
        payload[f"{name}_labels"] = _whole(part.labels)
    size_bytes = sum(part.images.nbytes + part.labels.nbytes for part in content.parts().values())
    with explain_disk_errors(path.parent, size_bytes), staging(path.parent) as folder:
        temporary = folder / path.name
        with temporary.open("xb") as file:
            save_tensors(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_to_disk(path.parent)


def open_decoded(path: Path, *, expected_sha256: str | None = None, verify: bool = True) -> Decoded:
    """Maps a decoded file. With `verify`, hashes its content; without, compares what its header says only.

    Other processes do not `discard` it while this one has its training images.

    Raises FileNotFoundError when there is none, DamagedFile when it is not what was written, DataError when
    it may not be read.
    """
    try:
        payload = torch.load(path, mmap=True, weights_only=True)
        content, recorded = _content_of(payload)
        mean, std = (tuple(map(float, values)) for values in payload["pixel_statistics"])
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise DataError(f"{path} may not be read: {error.strerror}") from error
    except (RuntimeError, UnpicklingError, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged (not a decoded data set)") from error
    if expected_sha256 is not None and recorded != expected_sha256:
        raise DamagedFile(f"{path} is damaged (its digest is not the published one)")
    if verify and content_digest(content) != recorded:
        raise DamagedFile(f"{path} is damaged (its content does not match its digest)")
    _hold(path, content.train.images)
    return Decoded(content=content, sha256=recorded, path=path, mean=mean, std=std)


def _hold(path: Path, images: torch.Tensor) -> None:
    """Share a lock on the file for as long as the tensor lives."""
    with suppress(OSError):  # gone already, or a file system without locks
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(images, os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def discard(path: Path) -> None:
    """Deletes a decoded file, unless some process uses it: a training opens its test images at its end."""
    with suppress(FileNotFoundError, PermissionError), path.open("r+b") as file:  # another user's may stay
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            pass
        path.unlink()


def open_or_make(
    path: Path,
    make: Callable[[], Content],
    *,
    lock_path: Path,
    expected_sha256: str | None,
    verify: bool,
    say: Say,
) -> Decoded:
    """Opens the decoded file, made first where it is missing or damaged, by one process per machine.

    A file that is whole is opened without a lock, so a read-only data folder serves. Raises DataError when
    the content cannot be made, and ConfigError when the folder cannot be written.
    """
    with suppress(FileNotFoundError, DamagedFile):
        return open_decoded(path, expected_sha256=expected_sha256, verify=verify)
    with explain_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(lock_path, say) as keeps_out:
            if keeps_out:
                remove_stale(path.parent)
            try:
                return open_decoded(path, expected_sha256=expected_sha256)
            except FileNotFoundError:
                pass
            except DamagedFile as error:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                say(f"{error}; set aside as {aside.name}, making it again")
            content = make()
            check_digest(content, expected_sha256)
            write_decoded(content, path)
    return open_decoded(path, expected_sha256=expected_sha256, verify=False)


def check_digest(content: Content, expected_sha256: str | None) -> None:
    """Raises DataError when `content` is not what is pinned."""
    if expected_sha256 is not None and (found := content_digest(content)) != expected_sha256:
        raise DataError(f"{content.name}: decoded content has digest {found[:12]}, not {expected_sha256[:12]}")


def hold_lock(path: Path, say: Say, *, told_after_s: float = 3.0) -> AbstractContextManager[bool]:
    """Around what one process per machine prepares; others say a line, and wait for as long as it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for another process that is preparing {path.stem}"
    return locked(path, say, waiting, told_after_s=told_after_s)


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A fresh folder for unfinished files inside `parent`, removed on the way out whatever happens."""
    folder = parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir()  # not tempfile's 0700: a cache may be shared between users, and the umask decides
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(parent: Path) -> None:
    """Removes what killed processes left in `parent`; only for who keeps others out by the lock."""
    for leftover in parent.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def explain_disk_errors(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Makes a full disk a DataError, and a folder that may not be written a ConfigError, of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            need = f"about {needed_bytes / 1e6:.1f} MB are needed" if needed_bytes else "more room is needed"
            raise DataError(f"disk full: {need} in {folder}, {_free_megabytes(folder)} are free") from error
        if error.errno in _NOT_ALLOWED:
            raise ConfigError(f"cannot write in {folder}: {error.strerror}; choose another --data-dir") from error
        raise


def _free_megabytes(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f} MB"


def _content_of(payload: Any) -> tuple[Content, str]:
    if payload["layout"] != _LAYOUT:
        raise ValueError(f"layout {payload['layout']}, not {_LAYOUT}")
    parts = {
        name: ImageSet(payload[f"{name}_images"], payload[f"{name}_labels"])
        for name in ("train", "validation", "test")
        if f"{name}_images" in payload
    }
    content = Content(
        name=payload["name"],
        classes=tuple(payload["classes"]),
        train=parts["train"],
        test=parts["test"],
        validation=parts.get("validation"),
        notes=tuple(map(str, payload.get("notes", ()))),
    )
    return content, payload["sha256"]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor owning exactly its bytes: torch.save writes the storage behind a view whole."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
