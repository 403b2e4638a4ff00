"""One training step: gather, augment, forward, backward, update; `graphed_step` makes a CUDA graph of it."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from trainer.data.augment import augment_batch, mix_batch
from trainer.loop.batch_norm import BatchNormSums
from trainer.loop.casting import CastWeights
from trainer.loop.compiling import CompiledNetwork
from trainer.loop.ema import WeightAverage
from trainer.loop.loss import MixedLabels, TrainingLoss
from trainer.loop.optim import Optimizer
from trainer.loop.shards import ShardSums, sum_in_tree
from trainer.models import Classifier
from trainer.models.airbench import whitening_bias
from trainer.models.layers import dropout_layers, use_dropout_seeds
from trainer.ranks.data_parallel import NUM_PASSES_TO_ORDER, DataParallel
from trainer.ranks.world import World
from trainer.recipes import Augment


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKind:
    """What decides which operations a step has: each kind has a CUDA graph of its own.

    Args:
        image_size: pixels to which the step resizes the images; None for their own size.
        trains_whitening_bias: whether the step updates the bias of an airbench network's whitening layer.
    """

    image_size: int | None = None
    trains_whitening_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A rank's part of a global batch; the tensors are on the device.

    Args:
        images: uint8 `[M, C, H, W]`, the pool into which `indices` point: the whole training set, or the batch alone.
        indices: int64 `[B]`, the samples of all its shards, as positions in the pool.
        labels: int64 `[B]`, the samples' classes.
        augment_params: float32 `[B, P]`, the samples' rows of `draw_params`.
        dropout_seeds: int64 `[B]`, the samples' rows of `data.order.dropout_seeds`.
        lr_factor: float32 scalar.
        sizes: samples in each of the rank's shards, in order.
        num_images: samples of the global batch, over all ranks.
        kind: of the step; the same on all ranks.
    """

    images: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor
    augment_params: torch.Tensor
    dropout_seeds: torch.Tensor
    lr_factor: torch.Tensor
    sizes: tuple[int, ...]
    num_images: int
    kind: StepKind = StepKind()

    @property
    def owns_images(self) -> bool:
        """Whether the pool holds the images of this batch alone, so that the next batch has another pool."""
        return len(self.images) == len(self.indices)


class TrainStep:
    """The computation of a step. Calling it updates the model.

    Args:
        model: pixels to logits.
        autocast: makes the context of the forward pass's precision.
        world: the ranks that compute the step together.
        average: follows the weights, if the recipe has a moving average of them.
        compiled: computes the model's forward and backward passes; None for the model as it is.
    """

    def __init__(  # noqa: PLR0913 (the parts of a step)
        self,
        *,
        model: Classifier,
        optimizer: Optimizer,
        augment: Augment,
        loss: TrainingLoss,
        autocast: Callable[[], torch.autocast],
        world: World,
        average: WeightAverage[Classifier] | None = None,
        compiled: CompiledNetwork | None = None,
    ) -> None:
        self._model = model if compiled is None else compiled
        self._compiled = compiled
        self._optimizer = optimizer
        self._augment = augment
        self._loss = loss
        self._average = average
        self.whitening_bias = whitening_bias(model.network)
        """Stays as it is in steps of a kind that does not train it; None if it is never trained."""

        self._autocast = autocast
        self._world = world
        self._uses_ddp = world.uses_ddp
        self._ddp: DataParallel | None = None
        self._kept: list[torch.Tensor] = []
        self._norms = BatchNormSums(model)
        self._sums = ShardSums(model, self._norms, has_gradients=not self._uses_ddp)
        self._dropouts = dropout_layers(model)
        self._cast = CastWeights(model) if compiled is None and _is_cast_together(model, world) else None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Runs the step.

        Returns:
            float32 `[2]`: the sum of the losses and the number of correct answers, over all ranks.
        """
        with nullcontext() if self._compiled is None else self._compiled.step(batch.sizes, batch.kind):
            return self._compute(batch)

    def _compute(self, batch: Batch) -> torch.Tensor:
        if self._uses_ddp and self._ddp is None:
            self._connect(batch)
        return self._update(batch, self._world.all_reduce)

    def rehearse(self, batch: Batch) -> None:
        """Runs a step without the other ranks: it changes the model and the optimizer, and means nothing."""
        self._update(batch, lambda sums: sums)

    def _update(self, batch: Batch, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        frozen = self._freeze(batch.kind)
        try:
            result = self._only_shard(batch) if self._has_one_shard(batch) else self._all_shards(batch, all_reduce)
            if frozen is not None:
                frozen.grad = None  # so that the optimizer leaves it alone
            self._optimizer.step(batch.lr_factor)
            if self._average is not None:
                self._average.update()
        finally:  # a step whose capture fails is run again, eagerly, and must not add to old gradients
            self._optimizer.zero_grad()
        return result

    def _has_one_shard(self, batch: Batch) -> bool:
        """Returns whether there is nothing to add up. On CPUs, all the same, steps have the bits that they always had.

        Virtual shards compute the same whatever the number of ranks. A shard of one image may leave out statistics of
        norms, which is up to `BatchNormSums`.
        """
        is_alone = self._world.size == 1 and self._world.virtual_shards is None
        return is_alone and len(batch.sizes) == 1 and batch.sizes[0] > 1 and batch.images.is_cuda

    def _only_shard(self, batch: Batch) -> torch.Tensor:
        with self._norms.updating():
            sums = self._differentiate(batch, 0, 0)
        self._sums.complete()
        return sums

    def _all_shards(self, batch: Batch, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        starts = [0, *itertools.accumulate(batch.sizes)]
        with self._norms.collecting():
            mine = sum_in_tree(lambda shard: self._shard(batch, shard, starts[shard]), len(batch.sizes))
            if self._ddp is not None and not any(batch.sizes):
                self._add_nothing(self._ddp, batch)
        return self._sums.unpack(all_reduce(mine), batch.num_images)

    def _freeze(self, kind: StepKind) -> nn.Parameter | None:
        """Returns the parameter that a kind of step does not train, and leaves out its gradient."""
        frozen = None if kind.trains_whitening_bias else self.whitening_bias
        if self.whitening_bias is not None and not self._uses_ddp:  # DDP expects all gradients that it knows
            self.whitening_bias.requires_grad_(frozen is None)
        return frozen

    def _shard(self, batch: Batch, shard: int, start: int) -> torch.Tensor:
        """Returns one shard's vector. Computes nothing for a shard without images."""
        size = batch.sizes[shard]
        return self._sums.collect(self._differentiate(batch, shard, start), size) if size else self._sums.zeros()

    def _differentiate(self, batch: Batch, shard: int, start: int) -> torch.Tensor:
        """Runs a shard's forward and backward pass.

        Returns:
            float32 `[2]`: the sum of the losses and the number of correct answers.
        """
        size = batch.sizes[shard]
        part = slice(start, start + size)
        labels: torch.Tensor | MixedLabels = batch.labels[part]
        # Before autocast: bfloat16 is too coarse for the positions of pixels.
        params = batch.augment_params[part]
        images = augment_batch(self._augment, batch.images, batch.indices[part], params, batch.kind.image_size)
        if self._augment.mixes:
            images, share = mix_batch(self._augment, images, batch.augment_params[part])
            labels = MixedLabels(batch.labels[part], batch.labels[part].flip(0), share)
        dropout_seeds = use_dropout_seeds(self._dropouts, batch.dropout_seeds[part])
        is_last = not any(batch.sizes[shard + 1 :])
        with self._autocast(), dropout_seeds, self._norms.forward_pass(size):
            logits = self._forward(images) if self._ddp is None else self._ddp.forward(images, is_last=is_last)
        factor = (1 if self._ddp is None else self._world.size) / batch.num_images
        loss = self._loss.measure(logits, labels, factor)
        if self._ddp is None:
            loss.backward()
        else:
            self._ddp.backward(loss.backward, is_last=is_last)
        return loss.sums

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._cast is None or not torch.is_autocast_enabled(images.device.type):
            logits: torch.Tensor = self._model(images)
            return logits
        return self._cast(images, torch.get_autocast_dtype(images.device.type))

    def disconnect(self) -> None:
        """Makes the next step, on all ranks, set up DDP anew: after a step that failed, it waits for gradients."""
        if self._ddp is not None:
            self._kept += self._ddp.gradients  # another graph may write to them
            self._ddp = None

    def _connect(self, batch: Batch) -> None:
        """Sets up DDP, and adds up gradients of zero until DDP knows the order in which gradients come.

        So the first step, of a run and of one that continues, adds up like all others: to the same bits.
        """
        self._ddp = self._world.data_parallel(self._model)
        with self._norms.collecting():
            for _ in range(NUM_PASSES_TO_ORDER):
                self._add_nothing(self._ddp, batch)
                self._optimizer.zero_grad()

    def _add_nothing(self, ddp: DataParallel, batch: Batch) -> None:
        """Adds up gradients of zero, so that the others do not wait for a rank without images."""
        images = batch.images[:1].contiguous()
        if not len(images):
            images = images.new_zeros(1, *images.shape[1:])
        dropout_seeds = use_dropout_seeds(self._dropouts, torch.zeros(1, dtype=torch.int64, device=images.device))
        with self._autocast(), dropout_seeds, self._norms.forward_pass(1):
            logits = ddp.forward(images, is_last=True)
        ddp.backward((logits.float().sum() * 0.0).backward, is_last=True)


def _is_cast_together(model: Classifier, world: World) -> bool:
    """Returns whether all weights are cast at once: not under DDP, which reduces each gradient as soon as it is there.

    Only on GPUs, where it saves launches, and for networks that are known to use weights in their layers alone.
    """
    is_known = getattr(model.network, "suits_kernels", False)
    return is_known and world.device.type == "cuda" and not world.uses_ddp
