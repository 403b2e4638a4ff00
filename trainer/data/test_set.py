"""The test images. Only `trainer.ledger`, which counts every look at them, may import this (import-linter checks)."""

from trainer.data.datasets import Dataset
from trainer.data.store import ImageSet, open_decoded
from trainer.errors import ConfigError


def load_test_set(dataset: Dataset) -> ImageSet:
    """Maps the test images, uint8 [N, C, H, W]. Apart on purpose: every look at them is to be counted.

    Raises ConfigError for a data set that was handed out without them.
    """
    if dataset.path is None:
        raise ConfigError(f"{dataset.name} was handed out for tuning, without its test images")
    return open_decoded(dataset.path, expected_sha256=dataset.sha256, verify=False).content.test
