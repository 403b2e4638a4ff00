"""The decoded file: one for each data set and machine, written atomically, and mapped by every process.

It is a file of tensors (`mapped_file`). This module does not know where images come from.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.data.content import Dataset, DatasetContent, ImageSet, content_digest
from trainer.data.mapped_file import DamagedFileError, map_tensors, share_lock, write_tensors
from trainer.data.staging import exclusive_folder
from trainer.data.statistics import pixel_statistics
from trainer.errors import DataError

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

    def dataset(self) -> Dataset:
        """Returns the data set without its test images."""
        content = self.content
        return Dataset(
            name=content.name,
            classes=content.classes,
            sha256=self.sha256,
            train=content.train,
            validation=content.validation,
            num_test=len(content.test),
            path=self.path,
            mean=self.mean,
            std=self.std,
            notes=content.notes,
            significant_bits=content.significant_bits,
        )


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
        "num_skipped": content.num_skipped,
    }
    for name, split in content.splits().items():
        payload[f"{name}_images"] = _compact(split.images)
        payload[f"{name}_labels"] = _compact(split.labels)
    size_bytes = sum(split.images.nbytes + split.labels.nbytes for split in content.splits().values())
    write_tensors(payload, path, size_bytes)


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
    payload = map_tensors(path)
    try:
        content, recorded = _content_of(payload)
        mean, std = (tuple(map(float, values)) for values in payload["pixel_statistics"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged (not a decoded data set)") from error
    share_lock(path, content.train.images)  # before the hashing, which takes a while
    if expected_sha256 is not None and recorded != expected_sha256:
        raise DamagedFileError(f"{path} is damaged (its digest is not the published one)")
    if verify and content_digest(content) != recorded:
        raise DamagedFileError(f"{path} is damaged (its content does not match its digest)")
    return DecodedDataset(content=content, sha256=recorded, path=path, mean=mean, std=std)


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
    with exclusive_folder(path.parent, lock_path, log):
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
        num_skipped=int(payload.get("num_skipped", 0)),
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
