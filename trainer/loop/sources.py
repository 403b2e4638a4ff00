"""The sources of batches. The training loop knows the protocol only.

A batch is a pure function of its step: no source has a state that a checkpoint would have to hold.
"""

from typing import Protocol, cast

import torch

from trainer.data import ImageSet
from trainer.data.folder.pipeline import ImageFiles
from trainer.errors import ConfigError
from trainer.loop.run import Run
from trainer.loop.samples import EpochSamples, StepShare
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
        ConfigError: they are decoded on demand.
    """

    def __init__(self, run: Run, images: torch.Tensor | None = None) -> None:
        self._run = run
        train = run.dataset.train
        if not isinstance(train, ImageSet):
            raise ConfigError(
                f"{run.dataset.name} is streamed, and seeds that train together need images in memory: give --source "
                "resident, or a smaller --image-size"
            )
        self.images = train.images.to(run.world.device) if images is None else images
        self._epoch: int | None = None

    def batch(self, step: int) -> Batch:
        """Returns slices of the epoch's samples. The first step of an epoch draws them."""
        run, batch_size = self._run, self._run.recipe.global_batch_size
        epoch, number = divmod(step, run.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._samples = EpochSamples.draw(run, epoch).to(run.world.device)
            self._lr_factors = run.lr_factors(epoch)
        share = StepShare.of(number * batch_size, len(self._samples.indices), batch_size, run.world)
        return self._samples.batch(self.images, share, self._lr_factors[number], run.image_size(step))

    def close(self) -> None:
        """Frees the images."""
        self.images = torch.empty(0, dtype=torch.uint8)
