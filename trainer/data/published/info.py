"""Facts about a data set that need no download: classes, shapes, digests, formats and sources."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from convoy.preprocessing import Method
from trainer.data.content import DatasetContent
from trainer.data.published.collect import KnownFile
from trainer.data.published.formats import TrainAndTest
from trainer.data.published.sources import Source


@dataclass(frozen=True, slots=True)
class FileFormat:
    """One of the formats in which a data set is published: its files and their decoder."""

    files: tuple[KnownFile, ...]
    decode: Callable[[Mapping[str, Path]], TrainAndTest]
    """Takes the path of each file by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """A data set that has a name: a published one, or one that comes with the package."""

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    num_train: int
    num_test: int
    sha256: str
    """`content_digest` of the decoded content."""
    preprocessing: Method = "fit"
    """How users' own images become like those of this data set."""
    formats: tuple[FileFormat, ...] = ()
    sources: tuple[Source, ...] = ()
    """In the order in which they are tried."""
    generate: Callable[[], TrainAndTest] | None = None
    """For a data set that comes with the package, which has neither formats nor sources."""

    @property
    def size_bytes(self) -> int:
        """Size of the decoded images and labels."""
        channels, height, width = self.image_shape
        return (self.num_train + self.num_test) * (channels * height * width + 8)

    def content(self, images: TrainAndTest) -> DatasetContent:
        """Returns the whole data set, given its images."""
        train, test = images
        return DatasetContent(self.name, self.classes, train, test)
