"""Decodes images in threads, ahead of their use. The decoders release Python's lock while they work.

The threads decide nothing: each image is decoded by its number and its box alone, into its place in the batch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Protocol

import torch

from convoy.images import Box, Pixels

_MAX_PER_TASK = 8
"""Images that a thread decodes one after the other: a task costs 30 µs, an image at least ten times as much."""


class ImageFiles(Protocol):
    """Images that are decoded one at a time."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""

    @property
    def sizes(self) -> torch.Tensor:
        """Int32 [N, 2], height and width of each file's image as a viewer shows it."""

    def decode(self, index: int, box: Box | None) -> Pixels:
        """Decodes one image, uint8 `[C, H, W]`; several threads call this at once.

        Args:
            index: number of the image.
            box: the part to decode; None for the image as evaluation and serving prepare it.

        Raises:
            DataError: the file has changed, is gone or is damaged; the message names it.
        """


class DecodedBatch:
    """A batch that is being decoded.

    Args:
        images: uint8 `[B, C, H, W]`, into which the tasks decode. The channels of a pixel lie side by side, as decoders
            write them: the step, which copies the batch in any case, separates them.
        tasks: begun, in the order of the images.
    """

    def __init__(self, images: torch.Tensor, tasks: list["Future[None]"]) -> None:
        self._images = images
        self._tasks = tasks

    def is_ready(self, timeout_s: float = 0.0) -> bool:
        """Returns whether `result` need not wait for other threads, or has an error to raise; waits for that."""
        is_done = not wait(self._tasks, timeout_s, return_when=FIRST_EXCEPTION).not_done
        return is_done or any(task.done() and task.exception() is not None for task in self._tasks)

    def result(self) -> torch.Tensor:
        """Waits for the images.

        Raises:
            DataError: an image cannot be decoded.
        """
        for task in self._tasks:
            task.result()
        self._tasks = []
        return self._images


class DecodePool:
    """Threads that decode batches, in the order in which they are begun.

    Args:
        files: the images.
        num_threads: number of threads.
        pin_memory: decodes into memory from which a GPU copies by itself.
    """

    def __init__(self, files: ImageFiles, num_threads: int, *, pin_memory: bool = False) -> None:
        self._files = files
        self._num_threads = num_threads
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def begin(self, indices: torch.Tensor, boxes: torch.Tensor | None = None) -> DecodedBatch:
        """Begins to decode a batch.

        Args:
            indices: int64 `[B]`.
            boxes: float32 `[B, 4]`, the part of each image; None for images as evaluation and serving prepare them.
        """
        num_channels, height, width = self._files.shape
        pixels = torch.empty(len(indices), height, width, num_channels, dtype=torch.uint8, pin_memory=self._pin_memory)
        images = pixels.permute(0, 3, 1, 2)
        per_task = max(1, min(_MAX_PER_TASK, len(indices) // (2 * self._num_threads)))
        chosen: list[Box | None] = [None] * len(indices) if boxes is None else [_box(row) for row in boxes.tolist()]
        parts = [slice(start, start + per_task) for start in range(0, len(indices), per_task)]
        tasks = [self._pool.submit(self._decode, images[part], indices[part].tolist(), chosen[part]) for part in parts]
        return DecodedBatch(images, tasks)

    def close(self) -> None:
        """Cancels what has not begun and waits for the rest."""
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, images: torch.Tensor, indices: list[int], boxes: Sequence[Box | None]) -> None:
        target = images.numpy()
        for position, (index, box) in enumerate(zip(indices, boxes, strict=True)):
            target[position] = self._files.decode(index, box)


def decode_chunks(files: ImageFiles, indices: torch.Tensor, size: int, num_threads: int) -> Iterator[torch.Tensor]:
    """Yields images as evaluation and serving prepare them, in order; decodes the next chunk while the caller works.

    Args:
        files: the images.
        indices: int64 `[N]`.
        size: number of images of a chunk; the last one may have fewer.
        num_threads: number of threads.

    Raises:
        DataError: an image cannot be decoded.
    """
    with closing(DecodePool(files, num_threads)) as pool:
        pending: DecodedBatch | None = None
        for start in range(0, len(indices), size):
            begun = pool.begin(indices[start : start + size])
            if pending is not None:
                yield pending.result().contiguous()
            pending = begun
        if pending is not None:
            yield pending.result().contiguous()


def _box(row: list[float]) -> Box:
    top, left, height, width = row
    return top, left, height, width
