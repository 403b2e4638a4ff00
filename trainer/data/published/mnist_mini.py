"""Makes mnist_mini.npz, the piece of MNIST in the package: `python -m trainer.data.published.mnist_mini`."""

from pathlib import Path

import numpy as np

from trainer.data.content import Images, ImageSet
from trainer.data.datasets import load_dataset
from trainer.data.split import stratified_split
from trainer.data.test_set import load_test_set
from trainer.paths import default_data_dir

_SEED = 0


def write_mnist_mini(target: Path, data_dir: Path) -> None:
    """Writes 5,000 training and 1,000 test images, drawn from MNIST's own parts by class share."""
    dataset = load_dataset("mnist", data_dir, log=print)
    train, test = _draw(dataset.train, 5_000), _draw(load_test_set(dataset), 1_000)
    np.savez_compressed(
        target,
        x_train=train.images[:, 0].numpy(),
        y_train=train.labels.numpy().astype(np.uint8),
        x_test=test.images[:, 0].numpy(),
        y_test=test.labels.numpy().astype(np.uint8),
    )


def _draw(images: Images, num_images: int) -> ImageSet:
    _, drawn = stratified_split(images.labels, num_images, _SEED)
    return ImageSet(images.take(drawn), images.labels[drawn])


if __name__ == "__main__":
    write_mnist_mini(Path(__file__).with_suffix(".npz"), default_data_dir())
