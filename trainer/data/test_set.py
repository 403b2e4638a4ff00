"""The test images. Only `trainer.evaluation.ledger`, which counts looks, may import this (import-linter checks)."""

from trainer.data.datasets import Dataset
from trainer.data.store import ImageSet, open_decoded
from trainer.errors import ConfigError, DataError


def load_test_set(dataset: Dataset) -> ImageSet:
    """Maps the test images, uint8 [N, C, H, W]. Apart on purpose: every look at them is to be counted.

    Raises ConfigError for a data set that was handed out without them, DataError where its file was deleted meanwhile.
    """
    if dataset.path is None:
        raise ConfigError(f"{dataset.name} was handed out for tuning, without its test images")
    try:
        return open_decoded(dataset.path, expected_sha256=dataset.sha256, verify=False).content.test
    except FileNotFoundError:
        raise DataError(
            f"{dataset.path} has been deleted while it was in use: put {dataset.name} back as it was at the beginning, "
            "and give the same command again"
        ) from None
