"""Batches that are decoded from files: by threads, some steps ahead of their use.

`EpochSamples` draws which images a batch has, and which part of each: neither the number of threads nor a restart
changes a batch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from trainer.data.folder.pipeline import DecodedBatch, DecodePool, ImageFiles
from trainer.loop.run import Run
from trainer.loop.samples import EpochSamples, share_of_step
from trainer.loop.step import Batch

_AHEAD_BYTES = 1 << 28
_MIN_AHEAD, _MAX_AHEAD = 2, 8
"""Steps whose batches are decoded before their turn: as many as fit in `_AHEAD_BYTES`, within these limits."""
_SHORT_WAIT_S = 1.0
"""The other ranks' watchdogs are told of a longer wait for images, which they must not count as a hang."""
_JUDGED_AFTER_S = 30.0
_SLOW_SHARE = 0.3
"""Training waits for images for a larger share of its first `_JUDGED_AFTER_S` than this: the user is told."""


class StreamedSource:
    """Decodes each batch from files while the device computes the steps before it.

    Args:
        run: its training images are `files`.
        files: the images, of which the recipe's random part is decoded.
    """

    def __init__(self, run: Run, files: ImageFiles) -> None:
        self._run, self._files = run, files
        self._pool = DecodePool(files, run.world.num_cpus, pin_memory=run.world.device.type == "cuda")
        self._num_ahead = _num_ahead(run)
        self._epochs: dict[int, _Epoch] = {}
        self._begun: dict[int, DecodedBatch] = {}
        self._uploader = _Uploader(run.world.device) if run.world.device.type == "cuda" else None
        self._waits = WaitRecord(run.world.num_cpus)

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, and begins to decode those of the next steps."""
        run = self._run
        for each in range(step, min(step + self._num_ahead + 1, run.num_steps)):
            if each not in self._begun:
                self._begun[each] = self._begin(each)
        begun = self._begun.pop(step)
        self._forget_before(step)
        epoch, number = divmod(step, run.steps_per_epoch)
        with self._waits.waiting(is_counted=number > 0):
            images = self._result(begun)
        if line := self._waits.advice(run.dataset.train.shape[1]):
            run.progress.log(line)
        drawn = self._epochs[epoch]
        batch = drawn.samples.batch(images, share_of_step(run, step), drawn.lr_factors[number], run.kind_of(step))
        batch = replace(batch, indices=torch.arange(len(images)))
        return batch if self._uploader is None else self._uploader.upload(batch)

    def close(self) -> None:
        """Stops the threads."""
        self._begun.clear()
        self._pool.close()

    def _begin(self, step: int) -> DecodedBatch:
        epoch = step // self._run.steps_per_epoch
        if epoch not in self._epochs:
            samples = EpochSamples.draw(self._run, epoch, sizes=self._files.sizes)
            self._epochs[epoch] = _Epoch(samples, self._run.lr_factors(epoch))
        samples, part = self._epochs[epoch].samples, share_of_step(self._run, step).part
        return self._pool.begin(samples.indices[part], None if samples.boxes is None else samples.boxes[part])

    def _forget_before(self, step: int) -> None:
        self._begun = {each: begun for each, begun in self._begun.items() if each > step}
        current = step // self._run.steps_per_epoch
        self._epochs = {epoch: drawn for epoch, drawn in self._epochs.items() if epoch >= current}

    def _result(self, begun: DecodedBatch) -> torch.Tensor:
        if begun.is_ready(_SHORT_WAIT_S):
            return begun.result()
        with self._run.world.activity.slow_phase():
            return begun.result()


@dataclass(frozen=True, slots=True)
class _Epoch:
    samples: EpochSamples
    lr_factors: torch.Tensor


class _Uploader:
    """Copies batches to a GPU on a stream of its own, while the GPU computes. `LookAhead` bounds their number."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def upload(self, batch: Batch) -> Batch:
        """Returns the batch on the GPU, for work that is queued on the current stream."""
        names = ("images", "indices", "labels", "augment_params", "dropout_seeds")
        with torch.cuda.stream(self._stream):
            moved = {name: getattr(batch, name).to(self._device, non_blocking=True).contiguous() for name in names}
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in moved.values():
            tensor.record_stream(current)  # its memory may be used again only after the step
        return replace(batch, **moved)


class WaitRecord:
    """Measures for how much of its time the training waits for images.

    Args:
        num_threads: number of threads that decode.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._waited_s = self._worked_s = 0.0
        self._left_at: float | None = None
        self._is_judged = False

    @contextmanager
    def waiting(self, *, is_counted: bool) -> Iterator[None]:
        """Context for waiting.

        Args:
            is_counted: False for the first batch of an epoch, as the validation lies before it.
        """
        began = time.monotonic()
        yield
        ended = time.monotonic()
        if is_counted and self._left_at is not None:
            self._worked_s += began - self._left_at
            self._waited_s += ended - began
        self._left_at = ended

    def advice(self, image_size: int) -> str | None:
        """Returns a line for the user, once, if images come too slowly."""
        total_s = self._waited_s + self._worked_s
        if self._is_judged or total_s < _JUDGED_AFTER_S:
            return None
        self._is_judged = True
        if self._waited_s < _SLOW_SHARE * total_s:
            return None
        return (
            f"the training waits for images for {100 * self._waited_s / total_s:.0f} % of its time, with "
            f"{self._num_threads} thread{'s' if self._num_threads != 1 else ''} to decode them: give each rank more "
            f"CPUs, or store smaller images (a shorter side of {2 * image_size} pixels suffices)"
        )


def _num_ahead(run: Run) -> int:
    share = -(-run.recipe.global_batch_size // run.world.num_computing)
    num_channels, height, width = run.dataset.train.shape
    return min(_MAX_AHEAD, max(_MIN_AHEAD, _AHEAD_BYTES // (share * num_channels * height * width)))
