"""An epoch's samples in the order in which it visits them, and each rank's part of a step."""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from trainer.data.augment import draw_crops, draw_params
from trainer.data.order import balanced_order, dropout_seeds, epoch_order
from trainer.loop.run import Run
from trainer.loop.shards import Share, share_of
from trainer.loop.step import Batch, StepKind


def share_of_step(run: Run, step: int) -> Share:
    """Returns this rank's part of a step; an epoch's last global batch may have fewer images."""
    world, batch_size = run.world, run.recipe.global_batch_size
    start = step % run.steps_per_epoch * batch_size
    num_images = min(batch_size, len(run.train_indices) - start)
    return share_of(num_images, world.rank, world.num_computing, world.num_shards, start=start)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSamples:
    """An epoch's samples in order, on one device, so that a batch is a slice.

    Args:
        indices: int64 `[N]`, into the training images.
        labels: int64 `[N]`, the samples' classes.
        augment_params: float32 `[N, P]`, the samples' rows of `draw_params`.
        dropout_seeds: int64 `[N]`, the samples' rows of `data.order.dropout_seeds`.
        boxes: float32 `[N, 4]`, the samples' rows of `draw_crops`, for a source that crops; None if images are not
            cropped at random, or by the step.
    """

    indices: torch.Tensor
    labels: torch.Tensor
    augment_params: torch.Tensor
    dropout_seeds: torch.Tensor
    boxes: torch.Tensor | None = None

    @classmethod
    def draw(cls, run: Run, epoch: int, *, sizes: torch.Tensor | None = None) -> Self:
        """Draws an epoch's order and everything else that is random about its samples, on the CPU.

        Args:
            sizes: int32 `[images, 2]`, height and width of the training images in their files, for a source that crops
                them at random where the recipe asks for that; None if the step does.
        """
        labels, num_images = run.dataset.train.labels, len(run.dataset.train.labels)
        if run.recipe.balanced_sampling:
            indices = run.train_indices[balanced_order(labels[run.train_indices], run.seed, epoch)]
            rows = torch.arange(len(indices))  # a sample that comes several times is augmented in several ways
        else:
            indices = rows = run.train_indices[epoch_order(len(run.train_indices), run.seed, epoch)]
        augment, image_size = run.recipe.augment, run.dataset.train.shape[1:] if sizes is None else None
        boxes = None
        if sizes is not None and augment.crops:
            sizes = sizes[indices] if run.recipe.balanced_sampling else sizes
            boxes = draw_crops(augment, sizes, run.seed, epoch)[rows]
        return cls(
            indices=indices,
            labels=labels[indices],
            augment_params=draw_params(augment, num_images, run.seed, epoch, image_size=image_size)[rows],
            dropout_seeds=dropout_seeds(num_images, run.seed, epoch)[rows],
            boxes=boxes,
        )

    def to(self, device: torch.device) -> Self:
        """Returns the samples on a device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in tensors.items()}
        return type(self)(**moved)

    def batch(self, images: torch.Tensor, share: Share, lr_factor: torch.Tensor, kind: StepKind) -> Batch:
        """Returns this rank's part of a step.

        Args:
            images: uint8 `[M, C, H, W]`, all images into which `indices` point.
            kind: of the step.
        """
        return Batch(
            images=images,
            indices=self.indices[share.part],
            labels=self.labels[share.part],
            augment_params=self.augment_params[share.part],
            dropout_seeds=self.dropout_seeds[share.part],
            lr_factor=lr_factor,
            sizes=share.sizes,
            num_images=share.num_images,
            kind=kind,
        )
