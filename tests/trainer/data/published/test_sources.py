"""The catalog of published data sets is complete and consistent."""

import pytest

from trainer.data.published.catalog import CIFAR10, FASHION_MNIST, MNIST
from trainer.data.published.info import DatasetInfo
from trainer.data.published.sources import LocalFiles, Mirror

PUBLISHED = pytest.mark.parametrize("info", [MNIST, FASHION_MNIST, CIFAR10], ids=lambda info: info.name)


@PUBLISHED
def test_files_have_digests_and_sizes(info: DatasetInfo) -> None:
    for file_format in info.formats:
        assert len({file.name for file in file_format.files}) == len(file_format.files)
        assert len({file.digest for file in file_format.files}) == len(file_format.files)
        for file in file_format.files:
            algorithm, _, digest = file.digest.partition(":")
            assert len(digest) == {"sha256": 64, "md5": 32}[algorithm]
            assert file.size_bytes > 0


@PUBLISHED
def test_every_file_is_within_the_limit_on_downloads(info: DatasetInfo) -> None:
    for file_format in info.formats:
        assert sum(file.size_bytes for file in file_format.files) < info.size_bytes + (4 << 20)


@PUBLISHED
def test_the_data_folder_is_the_first_source(info: DatasetInfo) -> None:
    assert isinstance(info.sources[0], LocalFiles)
    assert info.name in info.sources[0].paths
    labels = [source.label for source in info.sources]
    assert all(labels)
    assert len(set(labels)) == len(labels)
    for source in info.sources:
        if isinstance(source, Mirror):
            assert source.base_url.endswith("/")
            assert source.label in source.base_url


@PUBLISHED
def test_the_digest_of_the_content_is_known(info: DatasetInfo) -> None:
    assert len(info.sha256) == 64
    assert len(info.classes) == len(set(info.classes)) == 10
