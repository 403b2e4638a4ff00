"""Threads decode batches in order, ahead of their use, and stop when nobody wants more."""

import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from convoy.images import Box, Pixels
from trainer.data.folder.pipeline import DecodePool, decode_chunks
from trainer.errors import DataError

ALL = torch.arange(20)


class Numbers:
    """Images that show their own number; `gate` holds back those from `held` on."""

    shape = (1, 2, 2)
    sizes = torch.full((20, 2), 2, dtype=torch.int32)

    def __init__(self, held: int = 20, bad: int | None = None) -> None:
        self.gate = threading.Event()
        self.decoded: set[int] = set()
        self._held, self._bad = held, bad

    def decode(self, index: int, box: Box | None) -> Pixels:
        if index >= self._held:
            self.gate.wait()
        if index == self._bad:
            raise DataError(f"image {index} is gone")
        self.decoded.add(index)
        return np.full(self.shape, index, np.uint8)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode_")]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("size", [1, 6, 20, 100])
def test_chunks_come_in_order(num_threads: int, size: int) -> None:
    chunks = list(decode_chunks(Numbers(), ALL.flip(0), size, num_threads))
    assert torch.cat(chunks)[:, 0, 0, 0].tolist() == ALL.flip(0).tolist()
    assert all(len(chunk) == size for chunk in chunks[:-1])


def test_the_next_chunk_is_decoded_while_the_caller_works_and_no_further_one() -> None:
    files = Numbers(held=10)
    chunks = decode_chunks(files, ALL, 5, num_threads=2)
    next(chunks)
    files.gate.set()  # held back: the third chunk, which is not begun yet
    next(chunks)
    assert files.decoded >= set(range(10))
    assert not files.decoded & set(range(15, 20))
    del chunks  # a caller that stops early


def test_a_batch_has_the_channels_of_a_pixel_side_by_side_and_a_chunk_has_not() -> None:
    files = Numbers()
    files.shape = (3, 2, 2)
    with closing(DecodePool(files, 2)) as pool:
        assert pool.begin(ALL).result().is_contiguous(memory_format=torch.channels_last)
    assert next(decode_chunks(files, ALL, 20, 2)).is_contiguous()


def test_an_empty_set_has_no_chunks() -> None:
    assert list(decode_chunks(Numbers(), ALL[:0], 5, num_threads=2)) == []


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_image_that_cannot_be_decoded_is_an_error_in_its_chunk(num_threads: int) -> None:
    chunks = decode_chunks(Numbers(bad=12), ALL, 5, num_threads)
    assert len(list(islice(chunks, 2))) == 2
    with pytest.raises(DataError, match="image 12 is gone"):
        next(chunks)


def test_a_batch_tells_whether_it_is_ready() -> None:
    files = Numbers(held=0)
    pool = DecodePool(files, 1)
    batch = pool.begin(ALL[:3])
    assert not batch.is_ready()
    files.gate.set()
    assert batch.is_ready(timeout_s=60)
    assert batch.result().flatten(1)[:, 0].tolist() == [0, 1, 2]
    pool.close()
