"""Batch norm over the shards of a batch: each shard has its own statistics, and the running ones are updated once.

A shard is normalised by its own mean and variance. The running statistics get the mean and variance of all shards
together, weighted by their images, from sums that are reduced with the gradients. So the running statistics are the
same on every rank after every step, and do not depend on when a checkpoint is saved.

One value has no variance: where a shard of one image is down to 1 x 1 pixels, a norm uses the running statistics from
before the step instead, and adds nothing to them.

Knows nothing of ranks; `shards` and `ranks.world` reduce the sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.models.head import run_once


class BatchNormSums:
    """The batch statistics of a model's norms as sums over shards, and the running statistics that they update.

    The sums are of differences to the running mean before the step, which every shard knows: with sums of squares of
    the values themselves, the variance would be lost in the rounding of a large mean. A norm that is in evaluation mode
    when this is built is frozen, and has no sums.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if _updates_statistics(module)]
        buffers = [dict(norm.named_buffers()) for norm in self._norms]
        self._means = [buffer["running_mean"] for buffer in buffers]
        self._variances = [buffer["running_var"] for buffer in buffers]
        self._counts = [buffer["num_batches_tracked"] for buffer in buffers]
        self._sizes = [len(mean) for mean in self._means]
        momenta = [float(norm.momentum or 0.0) for norm in self._norms]
        self._momentum = torch.tensor(momenta).repeat_interleave(torch.tensor(self._sizes, dtype=torch.long))
        self._old = torch.empty(0)

    @property
    def length(self) -> int:
        """The number of sums: two for each channel."""
        return 2 * sum(self._sizes)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Context in which the norms' running statistics are the batch statistics of the last forward pass.

        The norms do not count here: `update` does, once for all shards.
        """
        if not self._norms:
            yield
            return
        self._old = torch.cat([*self._means, *self._variances])
        momenta = [norm.momentum for norm in self._norms]
        try:
            for norm in self._norms:
                norm.momentum, norm.num_batches_tracked = 1.0, None
            yield
        finally:
            for norm, momentum, count in zip(self._norms, momenta, self._counts, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count
            torch._foreach_copy_([*self._means, *self._variances], list(self._old.split([*self._sizes, *self._sizes])))

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Context of a step of one shard of several images: the norms update their running statistics themselves.

        These are those of `update`, up to rounding. Nothing else here is called in such a step.
        """
        for norm in self._norms:
            norm.num_batches_tracked = None
        try:
            yield
        finally:
            for norm, count in zip(self._norms, self._counts, strict=True):
                norm.num_batches_tracked = count
        if self._counts:
            torch._foreach_add_(self._counts, 1)

    @contextmanager
    def forward_pass(self, num_images: int) -> Iterator[None]:
        """Context of a shard's forward pass, inside of `collecting`.

        Args:
            num_images: images of the shard.
        """
        if num_images > 1 or not self._norms:  # no norm gets a single value
            yield
            return
        means, variances = (part.split(self._sizes) for part in self._old.split(sum(self._sizes)))
        handles = [
            norm.register_forward_pre_hook(partial(_use_running_statistics, mean=mean, variance=variance))
            for norm, mean, variance in zip(self._norms, means, variances, strict=True)
        ]
        try:
            yield
        finally:
            for handle, norm in zip(handles, self._norms, strict=True):
                handle.remove()
                norm.train()

    def write(self, sums: torch.Tensor, num_images: int) -> None:
        """Writes the sums of the last forward pass, over `num_images`, to `sums`, float32 `[length]`."""
        if not self._norms:
            return
        shift, square = sums.chunk(2)
        mean, variance = torch.cat([*self._means, *self._variances]).chunk(2)
        old_mean, _ = self._old.chunk(2)
        torch.sub(mean, old_mean, out=shift)
        torch.addcmul(variance, shift, shift, out=square)
        sums.mul_(num_images)

    def update(self, sums: torch.Tensor, num_images: int) -> None:
        """Updates the running statistics by a step's sums over all shards; call it after `collecting`.

        Args:
            sums: float32 `[length]`.
            num_images: images of the global batch.
        """
        if not self._norms:
            return
        self._momentum = self._momentum.to(sums.device)
        shift, square = (sums / num_images).chunk(2)
        old_mean, old_variance = self._old.chunk(2)
        mean = old_mean + self._momentum * shift
        variance = old_variance.lerp((square - shift * shift).clamp_(min=0), self._momentum)
        torch._foreach_copy_([*self._means, *self._variances], [*mean.split(self._sizes), *variance.split(self._sizes)])
        torch._foreach_add_(self._counts, 1)


def has_single_values(model: nn.Module, images: torch.Tensor) -> bool:
    """Returns whether a norm of the model gets one value per channel from one image.

    Args:
        images: uint8 `[B, C, H, W]`, of which the first is used.
    """
    found = []
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: found.append(_is_single(inputs[0]))) for norm in norms]
    try:
        run_once(model, images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return any(found)


def _updates_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.training and module.running_mean is not None


def _is_single(values: torch.Tensor) -> bool:
    return values.numel() == values.size(1)


def _use_running_statistics(
    norm: _BatchNorm, inputs: tuple[Any, ...], *, mean: torch.Tensor, variance: torch.Tensor
) -> None:
    if not _is_single(inputs[0]):
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.eval()
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
