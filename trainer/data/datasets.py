"""Data sets by name: everything but their test images, which `test_set` opens.

A data set is decoded once into one file, which every process maps. Knows names and what a data set is; where
published ones come from is in `sources`, folders of images in `folders`.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from trainer.data import synthetic
from trainer.data.published.download import DownloadProgress
from trainer.data.published.fetch import obtain
from trainer.data.published.formats import decode_npz
from trainer.data.published.sources import CIFAR10, FASHION_MNIST, MNIST, NamedSet
from trainer.data.split import stratified_split
from trainer.data.store import Decoded, Say, open_or_make
from trainer.data.store import ImageSet as ImageSet  # for whoever imports it from here
from trainer.errors import ConfigError, unknown_name
from trainer.paths import FOLDER_PREFIX, image_folder

_MINI_FILE = Path(__file__).parent / "published" / "mnist_mini.npz"

MNIST_MINI = NamedSet(
    name="mnist-mini",
    classes=MNIST.classes,
    image_shape=MNIST.image_shape,
    num_train=5_000,
    num_test=1_000,
    sha256="06549f7d8f4b04dbe9dcfd419e908af7cac222e6d785bb0e495994a30157b096",
    make=partial(decode_npz, _MINI_FILE),
)
SYNTHETIC = NamedSet(
    name="synthetic",
    classes=synthetic.CLASSES,
    image_shape=(1, synthetic.SIZE, synthetic.SIZE),
    num_train=synthetic.NUM_TRAIN,
    num_test=synthetic.NUM_TEST,
    sha256="032d47d2bf1aaa7c2e2872f9abd63f9eb83b24302139478385ede8101b37c459",
    make=synthetic.make_synthetic,
)
NAMED_SETS = {named.name: named for named in (MNIST, FASHION_MNIST, CIFAR10, MNIST_MINI, SYNTHETIC)}


@dataclass(frozen=True, slots=True)
class Dataset:
    """Everything about a data set but its test images; tensors are mapped from `path`, to be read only."""

    name: str
    classes: tuple[str, ...]
    sha256: str
    """Of the decoded content, test images included."""
    train: ImageSet
    validation: ImageSet | None
    """Only where a folder brings its own; otherwise `split_validation` takes some of `train`."""
    num_test: int
    path: Path | None
    """The decoded file; None where the test images are out of reach (`without_test_images`)."""
    mean: tuple[float, ...]
    """Of each channel of the training images, 0 to 255; those set aside for validation are counted in."""
    std: tuple[float, ...]
    """Likewise."""
    notes: tuple[str, ...] = ()
    """What was said of a folder when it was opened: what is left out of it, or stands in two parts."""


def load_dataset(name: str, data_dir: Path, *, image_size: int | None = None, verify: bool = True, say: Say) -> Dataset:
    """Opens a data set, fetching or decoding it first where needed; one process per machine does that.

    `verify` re-hashes the decoded file (at about 1.4 GB/s): one process per host is enough, and the others
    should load once it has, so that none keeps a damaged file that it replaces. `image_size` is for folders
    only.

    Raises ConfigError for a request that cannot be met, DataError for data that is missing, damaged or
    unreadable.
    """
    root = image_folder(name)
    if root is not None:
        from trainer.data.folder.image_folder import load_folder

        decoded = load_folder(root, data_dir, image_size=image_size, verify=verify, say=say)
    else:
        decoded = load_named(named_set(name, image_size), data_dir, verify=verify, say=say)
    content = decoded.content
    return Dataset(
        name=content.name,
        classes=content.classes,
        sha256=decoded.sha256,
        train=content.train,
        validation=content.validation,
        num_test=len(content.test),
        path=decoded.path,
        mean=decoded.mean,
        std=decoded.std,
        notes=content.notes,
    )


def without_test_images(dataset: Dataset) -> Dataset:
    """The same, for whoever tunes: nothing in it leads to the test images."""
    return replace(dataset, path=None)


def dataset_names() -> list[str]:
    """Names that `load_dataset` knows, besides `folder:PATH`."""
    return list(NAMED_SETS)


def split_validation(images: ImageSet, num_validation: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices for training and validation, int64, sorted: stratified, a function of labels, size and seed.

    Raises ConfigError when a class would be left without a training sample.
    """
    return stratified_split(images.labels, num_validation, seed)


def named_set(name: str, image_size: int | None = None) -> NamedSet:
    """Looks a name up. Raises ConfigError with the nearest names, and for another image size than the set's own."""
    if name in NAMED_SETS:
        width = NAMED_SETS[name].image_shape[2]
        if image_size is not None and image_size != width:
            raise ConfigError(f"--image-size is for folders: {name} is {width} pixels wide, not {image_size}")
        return NAMED_SETS[name]
    raise unknown_name("data set", name, [*NAMED_SETS, f"{FOLDER_PREFIX}PATH"])


def decoded_path(named: NamedSet, data_dir: Path) -> Path:
    """Where a named set's decoded file lies, or will."""
    return data_dir / named.name / f"{named.name}.pt"


def load_named(
    named: NamedSet, data_dir: Path, *, verify: bool = True, say: Say, progress: DownloadProgress | None = None
) -> Decoded:
    """Opens a named set's decoded file, fetching it first where it is missing or damaged."""
    return open_or_make(
        decoded_path(named, data_dir),
        lambda: obtain(named, data_dir, say=say, progress=progress),
        lock_path=data_dir / f"{named.name}.lock",
        expected_sha256=named.sha256,
        verify=verify,
        say=say,
    )
