"""Compares a training with the constant predictor, the baseline that knows the class frequencies and no image.

A constant predictor's cross-entropy is never below the entropy of the class frequencies (Gibbs' inequality). A training
whose losses stay there has learned nothing from its images. Nothing here ends a training: the user is warned.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from trainer.evaluation.evaluate import Evaluation

MIN_LOSS_GAIN = 0.05
"""A training that learns takes more than this share of the way from the baseline's loss to the lowest possible one."""
MIN_ACCURACY_GAIN = 0.1
"""The same for accuracies: a network with tiny logits may classify well long before its loss falls."""
ONE_CLASS_SHARE = 0.999
"""Share of the predictions from which they are (nearly) of one class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingWarning:
    """A sign that the network learns nothing useful.

    Args:
        kind: `no-gain`: the losses are those of the constant predictor. `one-class`: the predictions are of one class.
        text: the fault and a remedy, in one line without a full stop.
    """

    kind: Literal["no-gain", "one-class"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The constant predictor for a set of training images.

    Args:
        classes: the names of all classes.
        frequencies: of the classes among the training images, as the training loss counts them, float64 `[classes]`.
        label_smoothing: the training loss's; its targets have this share spread evenly over the classes.
    """

    classes: tuple[str, ...]
    frequencies: torch.Tensor
    label_smoothing: float

    @classmethod
    def of(
        cls, labels: torch.Tensor, classes: tuple[str, ...], label_smoothing: float, *, is_balanced: bool = False
    ) -> "Baseline":
        """Returns the baseline for training images with these labels, int64 `[N]`.

        Args:
            is_balanced: weights or sampling make the classes count the same in the training loss.
        """
        counts = torch.bincount(labels, minlength=len(classes)).double()
        counts = counts.sign() if is_balanced else counts
        return cls(classes=classes, frequencies=counts / counts.sum(), label_smoothing=label_smoothing)

    @property
    def prediction(self) -> torch.Tensor:
        """The probabilities that the training loss drives the constant predictor to, float64 `[classes]`."""
        return self._smooth(self.frequencies)

    @property
    def train_loss(self) -> float:
        """The constant predictor's training loss: the entropy of the mean target, in nats."""
        return _cross_entropy(self.prediction, self.prediction)

    @property
    def lowest_train_loss(self) -> float:
        """The entropy of one image's smoothed target: 0 without label smoothing."""
        target = self._smooth(torch.eye(len(self.classes), dtype=torch.float64)[0])
        return _cross_entropy(target, target)

    def loss(self, labels: torch.Tensor) -> float:
        """Returns the constant predictor's loss on other images, without label smoothing, in nats."""
        counts = torch.bincount(labels, minlength=len(self.classes)).double()
        return _cross_entropy(counts / counts.sum(), self.prediction)

    def check(self, train_loss: float | None, validation: Evaluation) -> list[TrainingWarning]:
        """Returns the signs, after an epoch, that the network learns nothing useful.

        Args:
            train_loss: mean over the epoch; None if it is unknown.
            validation: at the epoch's end.
        """
        if len(validation.labels.unique()) < 2 or self.train_loss - self.lowest_train_loss < 1e-6:
            return []
        return [*self._check_gain(train_loss, validation), *self._check_one_class(validation)]

    def _check_gain(self, train_loss: float | None, validation: Evaluation) -> list[TrainingWarning]:
        loss = self.loss(validation.labels)
        gain = 1 - validation.loss / loss
        losses = [("validation", validation.loss, loss)]
        if train_loss is not None:
            gain = max(gain, (self.train_loss - train_loss) / (self.train_loss - self.lowest_train_loss))
            losses.insert(0, ("train", train_loss, self.train_loss))
        if gain > MIN_LOSS_GAIN or _beats_the_commonest_class(validation):
            return []
        details = ", ".join(f"{name} loss {mine:.4f} (frequencies alone: {other:.4f})" for name, mine, other in losses)
        text = (
            f"the network predicts no better than the class frequencies: {details}, validation accuracy "
            f"{100 * validation.accuracy:.2f} %; try another --lr-scale or more --epochs, and check the labels"
        )
        return [TrainingWarning(kind="no-gain", text=text)]

    def _check_one_class(self, validation: Evaluation) -> list[TrainingWarning]:
        counts = torch.bincount(validation.predicted, minlength=len(self.classes))
        commonest, num_images = int(counts.argmax()), validation.num_images
        count = int(counts[commonest])
        num_labels = int((validation.labels == commonest).sum())
        # A rare class may be rarer than 0.1 %: then predictions that are nearly all of one class may all be right.
        if count < num_images and (count < ONE_CLASS_SHARE * num_images or num_labels > 0.99 * num_images):
            return []
        are = "is" if num_labels == 1 else "are"
        which = f"all {num_images:,}" if count == num_images else f"{count:,} of {num_images:,}"
        text = (
            f"the network predicts the class {self.classes[commonest]!r} for {which} validation images, of which "
            f"{num_labels:,} {are} of that class; try another --lr-scale or more --epochs, and check the labels"
        )
        return [TrainingWarning(kind="one-class", text=text)]

    def _smooth(self, target: torch.Tensor) -> torch.Tensor:
        return (1 - self.label_smoothing) * target + self.label_smoothing / len(self.classes)


def _beats_the_commonest_class(validation: Evaluation) -> bool:
    """Returns whether the accuracy is clearly above the share of the commonest label."""
    share = float(torch.bincount(validation.labels).max()) / validation.num_images
    two_sigma = 2 * (share * (1 - share) / validation.num_images) ** 0.5
    return bool(validation.accuracy > share + max(MIN_ACCURACY_GAIN * (1 - share), two_sigma))


def _cross_entropy(shares: torch.Tensor, prediction: torch.Tensor) -> float:
    """Returns the mean loss of one prediction for labels with these shares; a share of 0 counts nothing."""
    return -float(torch.xlogy(shares, prediction.clamp(min=1e-12)).sum())
