"""The training loss of a shard, whose images may be mixtures of two, and the number of correct answers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trainer.kernels.operations import cross_entropy
from trainer.recipes.hyperparameters import ClassWeights


@dataclass(frozen=True, slots=True)
class MixedLabels:
    """The labels of mixtures of two images.

    Args:
        first: int64 `[B]`.
        second: int64 `[B]`.
        share: float32 `[B]`, the share of `first`; the rest is that of `second`.
    """

    first: torch.Tensor
    second: torch.Tensor
    share: torch.Tensor


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """The loss of a shard, and where its backward pass begins.

    Args:
        sums: float32 `[2]`, the sum of the losses and the number of correct answers, without gradient.
        root: where the backward pass begins: the loss, or the logits.
        gradient: that of `root`, if that is no scalar.
    """

    sums: torch.Tensor
    root: torch.Tensor
    gradient: torch.Tensor | None = None

    def backward(self) -> None:
        torch.autograd.backward(self.root, self.gradient)


@dataclass(frozen=True, slots=True)
class TrainingLoss:
    """The cross-entropy, summed over the images of a shard.

    Args:
        label_smoothing: share of the target that is spread evenly over all classes.
        class_weights: float32 `[classes]`, factors of the images' losses by their label; None for 1.
    """

    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None

    def measure(self, logits: torch.Tensor, labels: torch.Tensor | MixedLabels, factor: float = 1.0) -> MeasuredLoss:
        """Returns the loss of a shard.

        Args:
            logits: `[B, classes]` of any floating-point type.
            labels: int64 `[B]`, or those of mixtures.
            factor: of the loss in the backward pass.
        """
        if not isinstance(labels, MixedLabels) and self.class_weights is None:
            measured = cross_entropy(logits, labels, self.label_smoothing, factor)
            if measured is not None:
                sums, gradient = measured
                return MeasuredLoss(sums, logits, gradient)
        logits = logits.float()
        loss = self(logits, labels)
        sums = torch.stack((loss.detach(), count_correct(logits, labels).to(loss.dtype)))
        return MeasuredLoss(sums, loss * factor)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor | MixedLabels) -> torch.Tensor:
        """Returns the sum of the losses; the loss of a mixture is the mean over its labels, weighted by their shares.

        Args:
            logits: float32 `[B, classes]`.
            labels: int64 `[B]`, or those of mixtures.
        """
        if isinstance(labels, MixedLabels):
            first, second = self._each(logits, labels.first), self._each(logits, labels.second)
            return torch.lerp(second, first, labels.share).sum()
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
        return self._each(logits, labels).sum()

    def _each(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the images' losses, `[B]`."""
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        return losses if self.class_weights is None else losses * self.class_weights[labels]


def class_weights(kind: ClassWeights, labels: torch.Tensor, num_classes: int) -> torch.Tensor | None:
    """Returns the weight of each class, float32 `[classes]`, with a mean over the images of 1; None for no weights.

    Args:
        labels: int64 `[N]`, those of the training images.
    """
    if kind == "none":
        return None
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / (counts.clamp(min=1) * (counts > 0).sum())


def count_correct(logits: torch.Tensor, labels: torch.Tensor | MixedLabels) -> torch.Tensor:
    """Returns the number of correct answers, int64 scalar; of a mixture's labels, that with the larger share counts."""
    if isinstance(labels, MixedLabels):
        labels = torch.where(labels.share >= 0.5, labels.first, labels.second)
    return (logits.detach().argmax(dim=1) == labels).sum()
