"""Images of a folder that are decoded when they are taken."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from convoy.images import Box, ImageError, Pixels
from convoy.named_files import read_regular
from trainer.data.content import Dataset, image_digests
from trainer.data.folder.decoder import decode_crop
from trainer.data.folder.index import FolderIndex, open_index
from trainer.data.folder.pipeline import decode_chunks
from trainer.data.folder.splits import split_rows
from trainer.data.folder.workers import ignore_warnings
from trainer.data.order import generator
from trainer.data.staging import explain_disk_errors
from trainer.data.statistics import PixelSums, Statistics
from trainer.errors import ConfigError, DataError
from trainer.files import write_json
from trainer.recipes.augmentation import Square

NUM_SAMPLED = 4096
"""Training images from which the mean and standard deviation of the pixels are computed."""
_CHUNK_SIZE = 64


@dataclass(frozen=True, slots=True, eq=False)
class FolderImages:
    """Some of the images of a folder; implements `Images`. Another process gets them by the path of the index.

    Args:
        rows: int64 [N], positions in the index.
        labels: int64 [N].
        shape: (C, H, W); images are square.
        significant_bits: of 16-bit grey images.
        square: how images become squares.
        num_threads: threads that decode outside of training; None for torch's number.
    """

    index: FolderIndex
    rows: torch.Tensor
    labels: torch.Tensor
    shape: tuple[int, int, int]
    significant_bits: int = 16
    square: Square = "crop"
    num_threads: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> torch.Tensor:
        """Height and width of each image before it is resized, int32 [N, 2]: as a viewer shows it, or of its square."""
        sizes = self.index.extents[self.rows]
        return sizes.amax(dim=1, keepdim=True).expand(-1, 2) if self.square == "pad" else sizes

    def decode(self, number: int, box: Box | None = None) -> Pixels:
        """Decodes an image.

        Args:
            number: 0 to N - 1.
            box: a part of the image, as `decode_crop` takes it; None for the image as it is evaluated and served.

        Returns:
            Uint8 [C, H, W].

        Raises:
            DataError: the file has changed or is gone since the data set was opened, or cannot be read.
        """
        row = int(self.rows.numpy()[number])
        num_channels, size, _ = self.shape
        if box is None or self.square == "pad":
            path, data = self.index.unchanged_file(row), None
        else:
            path, data = self.index.read_unchanged_file(row)
        try:
            return decode_crop(path, box, size, num_channels, self.significant_bits, square=self.square, data=data)
        except ImageError as error:
            self.index.unchanged_file(row)  # it may have been replaced just now
            raise DataError(f"{path} cannot be read any more: {error}") from error

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        return next(self.chunks(indices, len(indices)), torch.empty(0, *self.shape, dtype=torch.uint8))

    def chunks(self, indices: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """Yields decoded images, `size` at a time. Threads decode the next chunk while the caller works."""
        return decode_chunks(self, indices, max(1, size), self.num_threads or torch.get_num_threads())

    def digests(self, indices: torch.Tensor) -> list[bytes]:
        """Returns the SHA-256 of each image's pixels as they are evaluated, the same as of a resident set."""
        return [digest for chunk in self.chunks(indices, _CHUNK_SIZE) for digest in image_digests(chunk)]


def open_streamed(
    name: str,
    splits: dict[str, FolderImages],
    significant_bits: int | None,
    describe: Callable[[], tuple[str, ...]],
    log: Callable[[str], None],
) -> Dataset:
    """Opens a folder for decoding on demand.

    Args:
        name: of the data set.
        splits: those of `split_rows`, of one complete index.
        significant_bits: of 16-bit grey images; None without such images.
        describe: returns the notes of the data set, which takes a while.
        log: receives each line for the user.

    Raises:
        DataError: images are missing or have changed.
    """
    index, size = splits["train"].index, splits["train"].shape[1]
    assert index.path is not None
    ignore_warnings()  # they were logged when the index was made
    sha256 = _streamed_sha256(splits)
    path = index.path.with_name(f"{size}-{index.key}-{sha256[:12]}.json")
    facts = _read_facts(path)
    if facts is None:
        facts = _Facts(*_statistics(splits["train"], log), describe())
        with suppress(ConfigError), explain_disk_errors(path.parent):  # a read-only folder is found out again
            write_json(path, asdict(facts))
    return Dataset(
        name=name,
        classes=index.classes,
        sha256=sha256,
        train=splits["train"],
        validation=splits.get("validation"),
        num_test=len(splits["test"]),
        path=index.path,
        mean=facts.mean,
        std=facts.std,
        notes=facts.notes,
        significant_bits=significant_bits,
    )


def open_test_images(path: Path, train: FolderImages) -> FolderImages:
    """Returns the test images of a streamed data set.

    Args:
        path: the file of the index.
        train: the training images of the same data set.

    Raises:
        FileNotFoundError: the index has been deleted.
    """
    index = open_index(path)
    rows = split_rows(index)["test"]
    return replace(train, index=index, rows=rows, labels=index.labels[rows])


def _streamed_sha256(splits: dict[str, FolderImages]) -> str:
    """Returns the digest of the order, labels, splits and files of the images, their size and their channels."""
    train = splits["train"]
    padded = " padded" if train.square == "pad" else ""
    digest = hashlib.sha256(f"streamed {list(train.shape)} {train.significant_bits}{padded}\n".encode())
    for name, images in splits.items():
        digest.update(f"{name} {len(images)}\n".encode())
        digest.update(images.labels.numpy().tobytes())
        digest.update(images.index.file_sha256[images.rows].numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Facts:
    """What takes a while to find out about a streamed data set."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]


def _read_facts(path: Path) -> _Facts | None:
    with suppress(OSError, ValueError, TypeError):
        return _Facts(**{name: tuple(value) for name, value in json.loads(read_regular(path)).items()})
    return None


def _statistics(train: FolderImages, log: Callable[[str], None]) -> Statistics:
    """Returns mean and standard deviation of each channel of a sample that does not depend on the machine."""
    order = torch.randperm(len(train), generator=generator("pixel-statistics", 0))
    sample = order[:NUM_SAMPLED].sort().values
    log(f"mean and standard deviation of the pixels are those of {len(sample):,} of {len(train):,} training images")
    sums = PixelSums(train.shape[0])
    for chunk in train.chunks(sample, _CHUNK_SIZE):
        sums.add(chunk)
    return sums.result()
