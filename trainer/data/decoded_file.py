"""The decoded file: one for each data set and machine, written atomically, and mapped by every process.

It holds plain tensors in torch's own format, opened with `mmap=True` and `weights_only=True`: the processes of a host
share its pages, so that memory does not grow with the number of ranks. This module does not know where images come
from.
"""

import fcntl
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.data.content import DatasetContent, ImageSet, content_digest
from trainer.data.staging import explain_disk_errors, file_lock, remove_stale, staging
from trainer.data.statistics import pixel_statistics
from trainer.errors import DataError
from trainer.files import flush_to_disk, save_tensors

_LAYOUT = 2


@dataclass(frozen=True, slots=True)
class DecodedDataset:
    """An opened decoded file."""

    content: DatasetContent
    """Mapped from the file."""
    sha256: str
    """`content_digest` of the content."""
    path: Path
    mean: tuple[float, ...]
    """Of each channel of the training images, 0 to 255, computed when they were decoded."""
    std: tuple[float, ...]
    """Standard deviation, likewise."""


class DamagedFileError(DataError):
    """A decoded file is not what was written; `open_or_create` sets it aside and creates it again."""


def write_decoded(content: DatasetContent, path: Path) -> None:
    """Writes a decoded file atomically.

    Args:
        content: the data set.
        path: the new file, in an existing folder.

    Raises:
        DataError: the disk is full.
        ConfigError: the folder cannot be written.
    """
    payload: dict[str, Any] = {
        "layout": _LAYOUT,
        "name": content.name,
        "classes": list(content.classes),
        "sha256": content_digest(content),
        "pixel_statistics": pixel_statistics(content.train.images),
        "notes": list(content.notes),
        "significant_bits": content.significant_bits,
    }
    for name, split in content.splits().items():
        payload[f"{name}_images"] = _compact(split.images)
        payload[f"{name}_labels"] = _compact(split.labels)
    size_bytes = sum(split.images.nbytes + split.labels.nbytes for split in content.splits().values())
    with explain_disk_errors(path.parent, size_bytes), staging(path.parent) as folder:
        temporary = folder / path.name
        with temporary.open("xb") as file:
            save_tensors(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_to_disk(path.parent)


def open_decoded(path: Path, *, expected_sha256: str | None = None, verify: bool = True) -> DecodedDataset:
    """Maps a decoded file. `discard` leaves it alone, in other processes too, while its training images are in use.

    Args:
        path: the file.
        expected_sha256: the digest that the file must record; None for any.
        verify: hashes the content, at about 1.4 GB/s, and compares it with the recorded digest.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file is not what was written, or records another digest.
        DataError: the file cannot be opened or mapped.
    """
    payload = _load(path)
    try:
        content, recorded = _content_of(payload)
        mean, std = (tuple(map(float, values)) for values in payload["pixel_statistics"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged (not a decoded data set)") from error
    if expected_sha256 is not None and recorded != expected_sha256:
        raise DamagedFileError(f"{path} is damaged (its digest is not the published one)")
    if verify and content_digest(content) != recorded:
        raise DamagedFileError(f"{path} is damaged (its content does not match its digest)")
    _share_lock(path, content.train.images)
    return DecodedDataset(content=content, sha256=recorded, path=path, mean=mean, std=std)


def discard(path: Path) -> None:
    """Deletes a decoded file, unless a process uses it or it belongs to another user.

    A training opens its test images at its end, so the file must stay until then.
    """
    with suppress(FileNotFoundError, PermissionError), path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            pass
        path.unlink()


def open_or_create(
    path: Path,
    create: Callable[[], DatasetContent],
    *,
    lock_path: Path,
    expected_sha256: str | None,
    verify: bool,
    log: Callable[[str], None],
) -> DecodedDataset:
    """Opens a decoded file; one process of this machine creates it first where it is missing or damaged.

    Opening a good file takes no lock, so that a read-only data folder works.

    Args:
        path: the file.
        create: makes the content.
        lock_path: the lock file for creating it.
        expected_sha256: the published digest of the content; None where there is none.
        verify: hashes a file that is there.
        log: receives each line for the user.

    Raises:
        DataError: the content cannot be made, has another digest, or the disk is full.
        ConfigError: the folder cannot be written.
    """
    with suppress(FileNotFoundError, DamagedFileError):
        return open_decoded(path, expected_sha256=expected_sha256, verify=verify)
    with explain_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(lock_path, log) as excludes_others:
            if excludes_others:
                remove_stale(path.parent)
            try:
                return open_decoded(path, expected_sha256=expected_sha256)
            except FileNotFoundError:
                pass
            except DamagedFileError as error:
                set_aside = path.with_suffix(".damaged")
                os.replace(path, set_aside)
                log(f"{error}; set aside as {set_aside.name}, making it again")
            content = create()
            check_digest(content, expected_sha256)
            write_decoded(content, path)
    return open_decoded(path, expected_sha256=expected_sha256, verify=False)


def check_digest(content: DatasetContent, expected_sha256: str | None) -> None:
    """Raises DataError if the content has another digest than the expected one; None accepts any."""
    if expected_sha256 is not None and (found := content_digest(content)) != expected_sha256:
        raise DataError(f"{content.name}: decoded content has digest {found[:12]}, not {expected_sha256[:12]}")


def _share_lock(path: Path, images: torch.Tensor) -> None:
    """Holds a shared lock on the file for as long as the tensor lives."""
    with suppress(OSError):  # the file is gone already, or the file system has no locks
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(images, os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _load(path: Path) -> Any:
    """Maps the file. Opens it itself: torch opens no path that is not UTF-8, and does not tell why it cannot open one.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not a file of torch.
        DataError: it cannot be opened or mapped.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, error.filename) from error
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from error
    with file:
        try:
            return torch.load(path if _is_utf8(path) else f"/dev/fd/{file.fileno()}", mmap=True, weights_only=True)
        except Exception as error:
            if "unable to mmap" in str(error):  # too little address space, or a file system that maps no files
                reason = " ".join(str(error).partition("\n")[0].split())
                raise DataError(f"{path} cannot be mapped into memory: {reason}") from error
            raise DamagedFileError(f"{path} is damaged (not a decoded data set)") from error


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _content_of(payload: Any) -> tuple[DatasetContent, str]:
    """Returns the content and its recorded digest.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: the payload is not that of a decoded file.
    """
    if payload["layout"] != _LAYOUT:
        raise ValueError(f"layout {payload['layout']}, not {_LAYOUT}")
    splits = {
        name: ImageSet(payload[f"{name}_images"], payload[f"{name}_labels"])
        for name in ("train", "validation", "test")
        if f"{name}_images" in payload
    }
    content = DatasetContent(
        name=payload["name"],
        classes=tuple(payload["classes"]),
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        notes=tuple(map(str, payload.get("notes", ()))),
        significant_bits=payload.get("significant_bits"),
    )
    for split in content.splits().values():
        _check_tensors(split, len(content.classes))
    return content, payload["sha256"]


def _check_tensors(split: ImageSet, num_classes: int) -> None:
    images, labels = split.images, split.labels
    if (images.dtype, images.ndim) != (torch.uint8, 4) or (labels.dtype, labels.ndim) != (torch.int64, 1):
        raise ValueError("tensors of other types or shapes")
    if len(images) != len(labels) or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes):
        raise ValueError("labels that do not fit")


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in a storage of exactly its bytes: torch.save writes the whole storage behind a view."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
