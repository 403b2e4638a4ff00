"""One training step: gather, augment, forward, backward, update; eager, or replayed as one CUDA graph."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from trainer.data.augment import augment_batch, mix_batch
from trainer.loop.batch_norm import BatchNormSums
from trainer.loop.ema import WeightAverage
from trainer.loop.loss import MixedLabels, TrainingLoss, count_correct
from trainer.loop.optim import Optimizer
from trainer.loop.shards import ShardSums, sum_in_tree
from trainer.models import Classifier
from trainer.models.layers import dropout_layers, use_dropout_seeds
from trainer.recipes import Augment

NUM_EAGER_STEPS = 3
"""Steps before the capture, in which libraries choose their algorithms and NCCL connects the ranks."""


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
    """

    images: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor
    augment_params: torch.Tensor
    dropout_seeds: torch.Tensor
    lr_factor: torch.Tensor
    sizes: tuple[int, ...]
    num_images: int

    @property
    def owns_images(self) -> bool:
        """Whether the pool holds the images of this batch alone, so that the next batch has another pool."""
        return len(self.images) == len(self.indices)


class TrainStep:
    """The computation of a step. Calling it updates the model.

    Args:
        model: pixels to logits.
        average: follows the weights, if the recipe has a moving average of them.
        autocast: makes the context of the forward pass's precision.
        all_reduce: sums a vector over the ranks.
    """

    def __init__(  # noqa: PLR0913 (the parts of a step)
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        augment: Augment,
        loss: TrainingLoss,
        average: WeightAverage[Classifier] | None = None,
        autocast: Callable[[], torch.autocast],
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._augment = augment
        self._loss = loss
        self._average = average
        self._autocast = autocast
        self._all_reduce = all_reduce
        self._norms = BatchNormSums(model)
        self._sums = ShardSums(model, self._norms)
        self._dropouts = dropout_layers(model)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Runs the step.

        Returns:
            float32 `[2]`: the sum of the losses and the number of correct answers, over all ranks.
        """
        starts = [0, *itertools.accumulate(batch.sizes)]
        try:
            with self._norms.collecting():
                mine = sum_in_tree(lambda shard: self._shard(batch, shard, starts[shard]), len(batch.sizes))
            result = self._sums.unpack(self._all_reduce(mine), batch.num_images)
            self._optimizer.step(batch.lr_factor)
            if self._average is not None:
                self._average.update()
        finally:  # a step whose capture fails is run again, eagerly, and must not add to old gradients
            self._optimizer.zero_grad()
        return result

    def _shard(self, batch: Batch, shard: int, start: int) -> torch.Tensor:
        """Returns one shard's vector. Computes nothing for a shard without images."""
        size = batch.sizes[shard]
        if size == 0:
            return self._sums.zeros()
        part = slice(start, start + size)
        labels: torch.Tensor | MixedLabels = batch.labels[part]
        # Before autocast: bfloat16 is too coarse for the positions of pixels.
        images = augment_batch(self._augment, batch.images, batch.indices[part], batch.augment_params[part])
        if self._augment.mixes:
            images, share = mix_batch(self._augment, images, batch.augment_params[part])
            labels = MixedLabels(batch.labels[part], batch.labels[part].flip(0), share)
        dropout_seeds = use_dropout_seeds(self._dropouts, batch.dropout_seeds[part])
        with self._autocast(), dropout_seeds, self._norms.forward_pass(size):
            logits = self._model(images)
        logits = logits.float()
        loss = self._loss(logits, labels)
        (loss * (1 / batch.num_images)).backward()
        return self._sums.collect(loss.detach(), count_correct(logits, labels), size)


class GraphedStep:
    """A `TrainStep` as a single CUDA graph: one launch per step instead of some hundred.

    The first steps run eagerly on a side stream. Then a step is captured, which computes nothing, and from then on
    batches of the same size are replayed. A batch of another size (an epoch's last one) runs eagerly. If the capture
    fails, all steps stay eager, and `log` prints why.
    """

    def __init__(self, step: TrainStep, log: Callable[[str], None]) -> None:
        self._step = step
        self._log = log
        self._stream = torch.cuda.Stream()
        self._num_eager_left = NUM_EAGER_STEPS
        self._largest = 0
        self._may_capture = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._result: torch.Tensor | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Runs the step as `TrainStep.__call__` does; the next call overwrites the result."""
        self._largest = max(self._largest, batch.num_images)
        if self._may_capture and self._num_eager_left == 0 and batch.num_images == self._largest:
            self._may_capture = False
            self._capture(batch)
        if self._graph is None or self._batch is None or not _same_shape(batch, self._batch):
            self._num_eager_left = max(0, self._num_eager_left - 1)
            return self._eager(batch)
        self._copy(batch, self._batch)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def release(self) -> None:
        """Frees the graph; further steps are eager. NCCL's communicator cannot close while a graph uses it."""
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._batch = self._result = None
        self._may_capture = False

    def _eager(self, batch: Batch) -> torch.Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, batch: Batch) -> None:
        static = replace(
            batch,
            images=batch.images.clone() if batch.owns_images else batch.images,
            indices=batch.indices.clone(),
            labels=batch.labels.clone(),
            augment_params=batch.augment_params.clone(),
            dropout_seeds=batch.dropout_seeds.clone(),
            lr_factor=batch.lr_factor.clone(),
        )
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._step(static)
        except RuntimeError as error:
            self._result = None
            cause = str(_root_cause(error)).splitlines()[0]
            self._log(f"warning: no CUDA graph, the steps run one kernel at a time: {cause}")
            return
        self._graph, self._batch = graph, static

    @staticmethod
    def _copy(source: Batch, target: Batch) -> None:
        if target.owns_images:
            target.images.copy_(source.images)
        torch._foreach_copy_(_whole_numbers(target), _whole_numbers(source))  # one kernel for tensors of one type
        torch._foreach_copy_([target.augment_params, target.lr_factor], [source.augment_params, source.lr_factor])


def _root_cause(error: BaseException) -> BaseException:
    """Returns the first error: when a capture fails, each clean-up on the way out raises another one."""
    return error if error.__context__ is None else _root_cause(error.__context__)


def _whole_numbers(batch: Batch) -> list[torch.Tensor]:
    return [batch.indices, batch.labels, batch.dropout_seeds]


def _same_shape(a: Batch, b: Batch) -> bool:
    return a.sizes == b.sizes and a.num_images == b.num_images and a.images.shape == b.images.shape
