"""Opens test images. Only `trainer.evaluation.ledger`, which records each use, may import this module."""

from trainer.data.content import Dataset, Images
from trainer.data.decoded_file import open_decoded
from trainer.errors import ConfigError, DataError


def load_test_set(dataset: Dataset) -> Images:
    """Maps the test images. They are not part of `Dataset`, so that no use goes unrecorded.

    Raises:
        ConfigError: the data set comes from `without_test_images`.
        DataError: the decoded file has been deleted since the data set was opened.
    """
    if dataset.path is None:
        raise ConfigError(f"{dataset.name} was opened for tuning, without its test images")
    try:
        if dataset.is_streamed:
            from trainer.data.folder.streamed import FolderImages, open_test_images

            assert isinstance(dataset.train, FolderImages)
            images = open_test_images(dataset.path, dataset.train)
            if len(images) == dataset.num_test:
                return images
            raise FileNotFoundError
        return open_decoded(dataset.path, expected_sha256=dataset.sha256, verify=False).content.test
    except FileNotFoundError:
        raise DataError(
            f"{dataset.path} has been deleted while it was in use: restore {dataset.name} as it was at the start, "
            "and run the same command again"
        ) from None
