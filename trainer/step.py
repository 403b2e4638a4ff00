"""One training step: gather, augment, forward, backward, update; eager, or replayed as one CUDA graph."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from trainer.data import ImageSet
from trainer.data.augment import Augment
from trainer.optim import Optimizer

NUM_EAGER_STEPS = 11
"""Steps before a capture: DDP rebuilds its buckets and logs in its first ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A rank's part of a step.

    Args:
        indices: int64 `[B]`, the samples, on the device.
        numbers: float32 `[B, 6]`, their rows of `Augment.draw`, on the device.
        scale: float32 scalar on the device, what the sum of the losses is multiplied by before the backward pass.
        lr_factor: float32 scalar on the device.
    """

    indices: torch.Tensor
    numbers: torch.Tensor
    scale: torch.Tensor
    lr_factor: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """The computation of a step. Calling it updates the model.

    Args:
        model: pixels to logits; its gradients are averaged over the ranks if there are several.
        data: images and labels on the device.
        autocast: enters the precision of the forward pass.
    """

    model: nn.Module
    optimizer: Optimizer
    data: ImageSet
    augment: Augment
    label_smoothing: float
    autocast: Callable[[], torch.autocast]

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Run the step. Returns float32 `[2]`: the sum of the losses and the number of correct answers."""
        labels = self.data.labels[batch.indices]
        with self.autocast():
            logits = self.model(self.augment(self.data.images, batch.indices, batch.numbers))
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
        (loss * batch.scale).backward()
        self.optimizer.step(batch.lr_factor)
        self.optimizer.zero_grad()
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        return torch.stack([loss.detach(), correct.float()])


class GraphedStep:
    """A `TrainStep` as a single CUDA graph: one launch a step instead of some hundred.

    The first steps run eagerly on a side stream, as they would anyway; then the step is captured, which computes
    nothing, and from there on batches of the same size are replayed. A batch of another size (an epoch's last one)
    runs eagerly. Where capture fails, all steps stay eager, and `say` is told why.
    """

    def __init__(self, step: TrainStep, say: Callable[[str], None]) -> None:
        self._step = step
        self._say = say
        self._stream = torch.cuda.Stream()
        self._num_eager_left = NUM_EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._result: torch.Tensor | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """As `TrainStep.__call__`; the result is overwritten by the next call."""
        if self._num_eager_left >= 0 and self._graph is None:
            self._num_eager_left -= 1
            if self._num_eager_left < 0:
                self._capture(batch)
        if self._graph is None or self._batch is None or len(batch.indices) != len(self._batch.indices):
            return self._eager(batch)
        self._copy(batch, self._batch)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _eager(self, batch: Batch) -> torch.Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, batch: Batch) -> None:
        static = Batch(
            indices=batch.indices.clone(),
            numbers=batch.numbers.clone(),
            scale=batch.scale.clone(),
            lr_factor=batch.lr_factor.clone(),
        )
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._step(static)
        except RuntimeError as error:
            self._say(f"warning: no CUDA graph, the steps run one kernel at a time: {str(error).splitlines()[0]}")
            return
        self._graph, self._batch = graph, static

    @staticmethod
    def _copy(source: Batch, target: Batch) -> None:
        target.indices.copy_(source.indices)
        target.numbers.copy_(source.numbers)
        target.scale.copy_(source.scale)
        target.lr_factor.copy_(source.lr_factor)
