"""The tables: complete, consistent, and free of what must not be in them."""

import pytest

from trainer.data.published.sources import CIFAR10, FASHION_MNIST, MNIST, HandPlaced, Mirror, NamedSet

PUBLISHED = pytest.mark.parametrize("named", [MNIST, FASHION_MNIST, CIFAR10], ids=lambda named: named.name)


@PUBLISHED
def test_files_have_digests_and_sizes(named: NamedSet) -> None:
    for form in named.forms:
        assert len({file.name for file in form.files}) == len(form.files)
        assert len({file.digest for file in form.files}) == len(form.files)
        for file in form.files:
            algorithm, _, digest = file.digest.partition(":")
            assert len(digest) == {"sha256": 64, "md5": 32}[algorithm]
            assert file.size_bytes > 0


@PUBLISHED
def test_every_download_fits_under_the_bound(named: NamedSet) -> None:
    for form in named.forms:
        assert sum(file.size_bytes for file in form.files) < named.size_bytes + (4 << 20)


@PUBLISHED
def test_sources_begin_at_hand_and_are_named(named: NamedSet) -> None:
    assert isinstance(named.sources[0], HandPlaced)
    assert named.name in named.sources[0].paths
    labels = [source.label for source in named.sources]
    assert all(labels)
    assert len(set(labels)) == len(labels)
    for source in named.sources:
        if isinstance(source, Mirror):
            assert source.base_url.endswith("/")
            assert source.label in source.base_url


@PUBLISHED
def test_the_content_is_pinned(named: NamedSet) -> None:
    assert len(named.sha256) == 64
    assert len(named.classes) == len(set(named.classes)) == 10
