"""The sources of batches. The training loop knows the protocol only.

A batch is a pure function of its step: no source has a state that a checkpoint would have to hold.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, cast

import torch

from trainer.data import ImageSet
from trainer.data.folder.pipeline import ImageFiles
from trainer.errors import ConfigError
from trainer.loop.run import Run
from trainer.loop.samples import EpochSamples, share_of_step
from trainer.loop.step import Batch
from trainer.loop.streamed import StreamedSource


class BatchSource(Protocol):
    """A run's batches."""

    def batch(self, step: int) -> Batch:
        """Returns this rank's part of a step's batch, on the rank's device.

        Args:
            step: counted from 0 over all epochs. A source may prepare the steps that follow it.

        Raises:
            DataError: an image cannot be read.
        """

    def close(self) -> None:
        """Frees what the source holds. It makes no more batches."""


@functools.cache
def _drawing_thread() -> ThreadPoolExecutor:
    """Returns one thread for all sources: several would each have as many threads of their own as there are cores."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw-samples")


def open_source(run: Run) -> BatchSource:
    """Returns the source of a run's batches: resident for images in memory, streamed for those in files."""
    train = run.dataset.train
    return ResidentSource(run) if isinstance(train, ImageSet) else StreamedSource(run, cast(ImageFiles, train))


class ResidentSource:
    """All training images as one tensor on the device; the step itself gathers a batch from it.

    Args:
        run: its training images are in memory, or mapped from a file.
        images: the training images on the device, if another source has them there.

    Raises:
        ConfigError: they do not fit in the GPU's memory.
    """

    def __init__(self, run: Run, images: torch.Tensor | None = None) -> None:
        self._run = run
        self.images = self._upload(cast(ImageSet, run.dataset.train)) if images is None else images
        self._draws_ahead = run.world.device.type == "cuda"  # which would wait for the next epoch's samples
        self._ahead: tuple[int, Future[EpochSamples]] | None = None
        self._epoch: int | None = None

    def _upload(self, train: ImageSet) -> torch.Tensor:
        try:
            return train.images.to(self._run.world.device)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"the GPU's memory does not hold the {len(train.images):,} training images of "
                f"{train.images.nbytes / 1e9:.1f} GB: give --source streamed, or a smaller --image-size"
            ) from None

    def batch(self, step: int) -> Batch:
        """Returns slices of the epoch's samples. The first step of an epoch draws them."""
        run = self._run
        epoch, number = divmod(step, run.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._samples = self._draw(epoch).to(run.world.device)
            self._lr_factors = run.lr_factors(epoch)
        return self._samples.batch(self.images, share_of_step(run, step), self._lr_factors[number], run.kind_of(step))

    def _draw(self, epoch: int) -> EpochSamples:
        ahead, self._ahead = self._ahead, None
        samples = ahead[1].result() if ahead is not None and ahead[0] == epoch else EpochSamples.draw(self._run, epoch)
        if self._draws_ahead and epoch + 1 < self._run.recipe.epochs:
            # On the CPU alone: while a CUDA graph is captured, no other thread may ask for a GPU's memory.
            self._ahead = epoch + 1, _drawing_thread().submit(EpochSamples.draw, self._run, epoch + 1)
        return samples

    def close(self) -> None:
        """Frees the images."""
        self.images = torch.empty(0, dtype=torch.uint8)
