"""A global batch cut in shards, and the sums over them as one flat vector.

Floating-point sums depend on their order. Here the order is one binary tree over the shards, whichever ranks compute
them: a rank adds up the subtree of its own shards, and the ranks' sums are added up in pairs (`World.all_reduce`). With
as many shards as ranks, each rank has one, and the number of ranks need not be a power of two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from trainer.data.order import rank_share
from trainer.loop.batch_norm import BatchNormSums


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of a global batch.

    Args:
        part: its images, in the epoch's order.
        sizes: images in each of the rank's shards, in order; some are 0 if there are fewer images than shards.
        num_images: of the global batch, over all ranks.
    """

    part: slice
    sizes: tuple[int, ...]
    num_images: int


def share_of(num_images: int, rank: int, world_size: int, num_shards: int, *, start: int = 0) -> Share:
    """Returns a rank's part of a batch. The sizes of the shards depend on `num_images` and `num_shards` alone.

    A rank beyond `world_size` is a spare: it has one shard, without images.

    Args:
        start: of the batch, in the epoch's order.
    """
    if rank >= world_size:
        return Share(slice(0, 0), (0,), num_images)
    first, last = rank * num_shards // world_size, (rank + 1) * num_shards // world_size
    parts = [rank_share(num_images, shard, num_shards) for shard in range(first, last)]
    sizes = tuple(part.stop - part.start for part in parts)
    return Share(slice(start + parts[0].start, start + parts[-1].stop), sizes, num_images)


class ShardSums:
    """Lays out the vector: gradients, batch-norm sums, the sum of the losses, the number of correct answers.

    Args:
        has_gradients: whether the gradients are in it; else DDP sums them.
    """

    def __init__(self, model: nn.Module, norms: BatchNormSums, *, has_gradients: bool = True) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._device = trained[0].device
        self._parameters = trained if has_gradients else []
        self._norms = norms
        self._num_gradients = sum(parameter.numel() for parameter in self._parameters)
        self._length = self._num_gradients + norms.length + 2

    def zeros(self) -> torch.Tensor:
        """Returns the vector of a shard without images, float32 `[length]` on the model's device."""
        return torch.zeros(self._length, device=self._device)

    def complete(self) -> None:
        """Gives the parameters the gradients that `unpack` would, after the backward pass of the only shard.

        There is nothing to add up, and so nothing to copy: what has no gradient gets zeros.
        """
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is None:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            elif gradient.stride() != parameter.stride():  # autograd lets them differ where a size is 1
                parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())

    def collect(self, losses: torch.Tensor, num_images: int) -> torch.Tensor:
        """Returns one shard's vector after its backward pass, and clears the parameters' gradients.

        Args:
            losses: float32 `[2]`, the sum of the losses and the number of correct answers.
        """
        sums = self.zeros()
        gradients = [parameter.grad for parameter in self._parameters]
        views = [view for view, gradient in zip(self._views(sums), gradients, strict=True) if gradient is not None]
        if views:
            torch._foreach_copy_(views, [gradient for gradient in gradients if gradient is not None])
        for parameter in self._parameters:
            parameter.grad = None
        self._norms.write(sums[self._num_gradients : -2], num_images)
        sums[-2:] = losses
        return sums

    def unpack(self, sums: torch.Tensor, num_images: int) -> torch.Tensor:
        """Sets the parameters' gradients and updates the running statistics from the sums over all shards.

        Returns:
            float32 `[2]`: the sum of the losses and the number of correct answers.
        """
        for parameter, view in zip(self._parameters, self._views(sums), strict=True):
            parameter.grad = view
        self._norms.update(sums[self._num_gradients : -2], num_images)
        return sums[-2:]

    def _views(self, sums: torch.Tensor) -> list[torch.Tensor]:
        """Returns the gradients as views of the vector, with the strides of their parameters (channels last)."""
        views, at = [], 0
        for parameter in self._parameters:
            views.append(sums.as_strided(parameter.shape, parameter.stride(), at))
            at += parameter.numel()
        return views


def sum_in_tree(leaf: Callable[[int], torch.Tensor], num_leaves: int, first: int = 0) -> torch.Tensor:
    """Returns the sum of `leaf(first)`, …, `leaf(first + num_leaves - 1)`, added up along a binary tree.

    Calls `leaf` in order, keeps no more vectors at a time than the tree is deep, and overwrites them.

    Args:
        num_leaves: a power of two.
    """
    if num_leaves == 1:
        return leaf(first)
    half = num_leaves // 2
    left = sum_in_tree(leaf, half, first)
    return left.add_(sum_in_tree(leaf, num_leaves - half, first + half))
