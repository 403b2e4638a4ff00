"""An epoch's samples in the order in which it visits them, and each rank's part of a step."""

from dataclasses import dataclass
from typing import Self

import torch

from trainer.data.augment import draw_params
from trainer.data.order import dropout_seeds, epoch_order
from trainer.loop.run import Run
from trainer.loop.shards import share_of
from trainer.loop.step import Batch
from trainer.ranks.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSamples:
    """An epoch's samples in order, on the device, so that a batch is a slice.

    Args:
        indices: int64 `[N]`, into the training images.
        augment_params: float32 `[N, 6]`, the samples' rows of `draw_params`.
        dropout_seeds: int64 `[N]`, the samples' rows of `data.order.dropout_seeds`.
    """

    indices: torch.Tensor
    augment_params: torch.Tensor
    dropout_seeds: torch.Tensor

    @classmethod
    def draw(cls, run: Run, epoch: int) -> Self:
        """Draws an epoch's order and everything else that is random about its samples."""
        num_images, device = len(run.dataset.train.labels), run.world.device
        indices = run.train_indices[epoch_order(len(run.train_indices), run.seed, epoch)]
        return cls(
            indices=indices.to(device),
            augment_params=draw_params(run.recipe.augment, num_images, run.seed, epoch)[indices].to(device),
            dropout_seeds=dropout_seeds(num_images, run.seed, epoch)[indices].to(device),
        )

    def batch(self, start: int, batch_size: int, lr_factor: torch.Tensor, world: World) -> Batch:
        """Returns this rank's share of a global batch.

        Args:
            start: position of the global batch in the epoch's order.
            batch_size: images of the global batch; the epoch's last one may have fewer.
        """
        num_images = min(batch_size, len(self.indices) - start)
        share = share_of(num_images, world.rank, world.num_computing, world.num_shards)
        part = slice(start + share.part.start, start + share.part.stop)
        return Batch(
            indices=self.indices[part],
            augment_params=self.augment_params[part],
            dropout_seeds=self.dropout_seeds[part],
            lr_factor=lr_factor,
            sizes=share.sizes,
            num_images=num_images,
        )
