"""Data sets by name: everything about them except their test images, which `trainer.data.test_set` opens.

A data set is decoded once, into one file that every process maps. `published.catalog` has the sources of the published
data sets; `folder.image_folder` reads folders of images.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from trainer.data import synthetic
from trainer.data.content import Dataset
from trainer.data.decoded_file import DecodedDataset, open_or_create
from trainer.data.folder.options import FolderOptions
from trainer.data.published.catalog import CIFAR10, FASHION_MNIST, MNIST
from trainer.data.published.download import DownloadProgress
from trainer.data.published.fetch import fetch_dataset
from trainer.data.published.formats import decode_npz
from trainer.data.published.info import DatasetInfo
from trainer.errors import ConfigError, unknown_name
from trainer.paths import FOLDER_PREFIX, expand_home, image_folder

_MINI_FILE = Path(__file__).parent / "published" / "mnist_mini.npz"

MNIST_MINI = DatasetInfo(
    name="mnist-mini",
    classes=MNIST.classes,
    image_shape=MNIST.image_shape,
    num_train=5_000,
    num_test=1_000,
    sha256="06549f7d8f4b04dbe9dcfd419e908af7cac222e6d785bb0e495994a30157b096",
    preprocessing=MNIST.preprocessing,
    generate=partial(decode_npz, _MINI_FILE),
)
SYNTHETIC = DatasetInfo(
    name="synthetic",
    classes=synthetic.CLASSES,
    image_shape=(1, synthetic.SIZE, synthetic.SIZE),
    num_train=synthetic.NUM_TRAIN,
    num_test=synthetic.NUM_TEST,
    sha256="032d47d2bf1aaa7c2e2872f9abd63f9eb83b24302139478385ede8101b37c459",
    generate=synthetic.generate_synthetic,
)
DATASETS = {info.name: info for info in (MNIST, FASHION_MNIST, CIFAR10, MNIST_MINI, SYNTHETIC)}


def load_dataset(
    name: str,
    data_dir: Path,
    options: FolderOptions | None = None,
    *,
    verify: bool = True,
    log: Callable[[str], None],
) -> Dataset:
    """Opens a data set; one process of this machine fetches or decodes it first where needed.

    Args:
        name: one of `DATASETS`, or folder:PATH.
        data_dir: folder in which data sets are kept.
        options: how a folder is opened; the other data sets are resident and have one size.
        verify: hashes the decoded file, at about 1.4 GB/s. One process of a host is enough; the others should
            load after it, so that none keeps a damaged file that the first one replaces.
        log: receives each line for the user.

    Raises:
        ConfigError: there is no such data set, it has no images of that size, it is no folder and cannot be streamed,
            or the data folder is `~` and the user has no home directory.
        DataError: data are missing, damaged or unreadable.
    """
    root, data_dir, options = image_folder(name), expand_home(data_dir), options or FolderOptions()
    if root is not None:
        from trainer.data.folder.image_folder import load_image_folder

        return load_image_folder(root, data_dir, options, verify=verify, log=log)
    if options.source == "streamed":
        raise ConfigError(f"--source streamed is for folders of images (folder:PATH), not for {name}")
    return open_or_fetch(dataset_info(name, options.image_size), data_dir, verify=verify, log=log).dataset()


def without_test_images(dataset: Dataset) -> Dataset:
    """Returns the data set for tuning: nothing in it leads to the test images."""
    return replace(dataset, path=None)


def dataset_info(name: str, image_size: int | None = None) -> DatasetInfo:
    """Looks up a name.

    Raises:
        ConfigError: there is no such name (the message has the nearest ones), or its images have another size.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, [*DATASETS, f"{FOLDER_PREFIX}PATH"])
    width = DATASETS[name].image_shape[2]
    if image_size is not None and image_size != width:
        raise ConfigError(f"--image-size is for folders: {name} is {width} pixels wide, not {image_size}")
    return DATASETS[name]


def decoded_path(info: DatasetInfo, data_dir: Path) -> Path:
    """Returns the path of a data set's decoded file, which may not exist yet."""
    return data_dir / info.name / f"{info.name}.pt"


def open_or_fetch(
    info: DatasetInfo,
    data_dir: Path,
    *,
    verify: bool = True,
    log: Callable[[str], None],
    progress: DownloadProgress | None = None,
) -> DecodedDataset:
    """Opens the decoded file of a data set that has a name, and fetches the data set first where needed.

    Args:
        info: the data set.
        data_dir: folder in which data sets are kept.
        verify: hashes a file that is there.
        log: receives each line for the user.
        progress: receives the progress of downloads; None to log a line every ten seconds.

    Raises:
        DataError: no source has the data set, or the disk is full.
        ConfigError: the folder cannot be written.
    """
    return open_or_create(
        decoded_path(info, data_dir),
        lambda: fetch_dataset(info, data_dir, log=log, progress=progress),
        lock_path=data_dir / f"{info.name}.lock",
        expected_sha256=info.sha256,
        verify=verify,
        log=log,
    )
