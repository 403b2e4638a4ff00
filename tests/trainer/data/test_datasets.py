"""Data sets by name, and the ones that need no network."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data import ImageSet, load_dataset
from trainer.data.content import content_digest
from trainer.data.datasets import DATASETS
from trainer.data.decoded_file import open_decoded
from trainer.data.folder.options import FolderOptions
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError
from trainer.paths import default_data_dir


@pytest.mark.parametrize("name", ["mnist-mini", "synthetic"])
def test_sets_that_come_with_the_package(name: str, tmp_path: Path, logged: list[str]) -> None:
    dataset = load_dataset(name, tmp_path, log=logged.append)
    info = DATASETS[name]
    assert (dataset.name, dataset.sha256, dataset.num_test) == (name, info.sha256, info.num_test)
    assert dataset.train.images.shape == (info.num_train, *info.image_shape)
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.validation is None
    assert logged == []
    test = load_test_set(dataset)
    assert len(test) == info.num_test
    assert set(test.labels.tolist()) == set(range(len(dataset.classes)))
    assert dataset.path == tmp_path / name / f"{name}.pt"


def test_the_mini_set_has_the_class_shares_of_mnist(tmp_path: Path) -> None:
    train = load_dataset("mnist-mini", tmp_path, log=print).train
    assert torch.bincount(train.labels).tolist() == [494, 562, 496, 511, 487, 452, 493, 522, 487, 496]


def test_the_synthetic_set_can_be_learned_and_is_named_so(tmp_path: Path) -> None:
    dataset = load_dataset("synthetic", tmp_path, log=print)
    assert all("synthetic" in name for name in dataset.classes)

    def spectra(images: ImageSet) -> np.ndarray:  # a direction has its own place, whatever the phase
        centred = images.images[:, 0].numpy() - images.images[:, 0].numpy().mean((1, 2), keepdims=True)
        return np.abs(np.fft.rfft2(centred)).reshape(len(images), -1)

    labels = np.eye(len(dataset.classes))[dataset.train.labels.numpy()]
    weights, *_ = np.linalg.lstsq(spectra(dataset.train), labels, rcond=None)
    test = load_test_set(dataset)
    accuracy = ((spectra(test) @ weights).argmax(1) == test.labels.numpy()).mean()
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("name", "hint"), [("mnits", "did you mean mnist"), ("CIFAR-10", "did you mean cifar10"), ("x", "there are mnist,")]
)
def test_unknown_names(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_dataset(name, tmp_path, log=print)
    assert list(tmp_path.iterdir()) == []


def test_an_image_size_is_for_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--image-size is for folders: synthetic is 28 pixels wide, not 32"):
        load_dataset("synthetic", tmp_path, FolderOptions(image_size=32), log=print)
    load_dataset("synthetic", tmp_path, FolderOptions(image_size=28), log=print)


def test_without_verification_the_recorded_digest_is_compared(tmp_path: Path, logged: list[str]) -> None:
    first = load_dataset("synthetic", tmp_path, log=print)
    mini = load_dataset("mnist-mini", tmp_path, log=print)
    first.path.write_bytes(mini.path.read_bytes())
    again = load_dataset("synthetic", tmp_path, verify=False, log=logged.append)
    assert again.sha256 == first.sha256
    assert "set aside as synthetic.damaged" in logged[0]


def test_the_package_is_light_to_import() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import trainer.data; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert not {"torchvision", "PIL", "matplotlib", "pooch", "requests", "tyro", "rich", "http", "urllib"} & set(
        output.split()
    )


def test_names() -> None:
    assert list(DATASETS) == ["mnist", "fashion-mnist", "cifar10", "mnist-mini", "synthetic"]


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "means", "deviations", "first_labels"),
    [
        ("mnist", [33.31842145], [78.56748999], [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
        ("fashion-mnist", [72.94035223], [90.02118235], [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
        (
            "cifar10",
            [125.30691805, 122.95039414, 113.86538318],
            [62.99321928, 62.08870764, 66.70489964],
            [6, 9, 9, 4, 1, 1, 2, 7, 8, 3],
        ),
    ],
)
def test_published_data_sets(name: str, means: list[float], deviations: list[float], first_labels: list[int]) -> None:
    dataset = load_dataset(name, default_data_dir(), log=print)
    info = DATASETS[name]
    assert dataset.sha256 == info.sha256 == content_digest(open_decoded(dataset.path).content)
    assert dataset.train.images.shape == (info.num_train, *info.image_shape)
    assert dataset.mean == pytest.approx(means, abs=1e-7)
    assert dataset.std == pytest.approx(deviations, abs=1e-7)
    assert dataset.train.labels[:10].tolist() == first_labels
    assert torch.bincount(load_test_set(dataset).labels).min() > 800
