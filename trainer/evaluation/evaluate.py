"""Exact evaluation: each image once, counts in whole numbers, the same result for every world size.

Chunks of a fixed size, whatever the number of ranks, are shared out among the ranks. None is padded: torch's
DistributedSampler pads, and so counts images twice (https://github.com/pytorch/pytorch/issues/25162). The size follows
from that of the images alone. A chunk that does not fit in a GPU's memory, which may hold a training step beside it, is
computed in parts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trainer.data import Images, ImageSet
from trainer.errors import DivergenceError
from trainer.ranks.activity import Activity
from trainer.ranks.world import World

CHUNK_SIZE = 500
"""Images a forward pass, if they are small: few enough for the CPU's caches, enough for a GPU."""
MAX_CHUNK_PIXELS = 64 * 224 * 224
"""Pixels a forward pass: larger images come in smaller chunks, so that what fits in training fits here."""

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Logits float32 `[B, classes]` of pixels uint8 `[B, C, H, W]` on the model's device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model's predictions for a set of images.

    Args:
        labels: int64 `[N]`.
        predicted: int64 `[N]`.
        confidence: float32 `[N]`, the probability of the predicted class.
        label_probability: float32 `[N]`, the probability of the right class.
        loss: mean cross-entropy, in nats.
        predicted_with_views: int64 `[N]`, by the mean over the recipe's test-time views; None if it has one view. All
            other fields are of one view.
    """

    labels: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor
    label_probability: torch.Tensor
    loss: float
    predicted_with_views: torch.Tensor | None = None

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def num_errors(self) -> int:
        return int((self.predicted != self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Between 0 and 1; 0 for an empty set."""
        return 1 - self.num_errors / self.num_images if self.num_images else 0.0

    @property
    def num_errors_with_views(self) -> int | None:
        return None if self.predicted_with_views is None else int((self.predicted_with_views != self.labels).sum())

    @property
    def accuracy_with_views(self) -> float | None:
        """Between 0 and 1; 0 for an empty set."""
        if self.num_errors_with_views is None:
            return None
        return 1 - self.num_errors_with_views / self.num_images if self.num_images else 0.0

    def recall_by_class(self, classes: tuple[str, ...]) -> dict[str, float]:
        """Returns the share of each class's images that are classified correctly; classes without images are left out.

        Args:
            classes: the names of all classes.
        """
        num_images = torch.bincount(self.labels, minlength=len(classes)).tolist()
        num_right = torch.bincount(self.labels[self.predicted == self.labels], minlength=len(classes)).tolist()
        counts = zip(classes, num_right, num_images, strict=True)
        return {name: right / images for name, right, images in counts if images}

    def worst_mistakes(self, most: int) -> torch.Tensor:
        """Returns the positions of the mistakes with the highest confidence, at most `most`, highest first, int64."""
        wrong = torch.nonzero(self.predicted != self.labels)[:, 0]
        return wrong[torch.argsort(self.confidence[wrong], descending=True, stable=True)[:most]]

    def confusion(self, num_classes: int) -> torch.Tensor:
        """Returns the confusion matrix, int64 `[classes, classes]`: labels in rows, predictions in columns."""
        cells = self.labels * num_classes + self.predicted
        return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def chunk_size(shape: tuple[int, int, int]) -> int:
    """Returns the number of images a forward pass, for images of that shape, (C, H, W)."""
    return max(1, min(CHUNK_SIZE, MAX_CHUNK_PIXELS // (shape[1] * shape[2])))


def evaluate(
    predict: Predict,
    images: Images,
    indices: torch.Tensor | None,
    world: World,
    *,
    predict_with_views: Predict | None = None,
) -> Evaluation:
    """Evaluates images, each on one rank, and returns the whole result on every rank.

    Args:
        predict: the model for one view of each image, as it is exported and served.
        indices: which of the images, int64; all of them if None.
        predict_with_views: the model for several views of each image, for the figures with views.

    Raises:
        DivergenceError: an image's outputs are not finite. They are no answer, although `argmax` of NaNs gives a class.
    """
    if indices is None:
        indices = torch.arange(len(images.labels))
    # Rows of `_answers`. float64 holds each value exactly, so that adding the zeros of the other ranks changes nothing.
    table = torch.zeros(len(indices), 5, dtype=torch.float64)
    size = chunk_size(images.shape)
    positions = range(world.rank * size, len(indices), world.size * size)
    mine = torch.cat([indices[:0], *(indices[start : start + size] for start in positions)])
    with world.activity.computing():
        # Of all chunks only the last one may be smaller, so that the chunks of `mine` begin at these positions.
        chunks = images.chunks(mine, size)
        if not isinstance(images, ImageSet):
            chunks = _waiting_for(chunks, world.activity)
        part_size = size
        for start, decoded in zip(positions, chunks, strict=True):
            chunk = indices[start : start + size]
            pixels, labels = decoded.to(world.device), images.labels[chunk].to(world.device)
            logits, views, part_size = _in_parts(predict, predict_with_views, pixels, part_size)
            table[start : start + len(chunk)] = _answers(logits, views, labels).cpu()
        table = world.all_reduce_sum(table.to(world.device))
    if len(bad := torch.nonzero(~table[:, 3].isfinite())):
        raise DivergenceError(
            f"the network's outputs for {len(bad):,} of {len(indices):,} images are not finite, first for image "
            f"{int(indices[bad[0]])}"
        )
    return Evaluation(
        labels=images.labels[indices],
        predicted=table[:, 0].long(),
        confidence=table[:, 1].float(),
        label_probability=table[:, 2].float(),
        loss=float(table[:, 3].mean()),
        predicted_with_views=None if predict_with_views is None else table[:, 4].long(),
    )


def _answers(logits: torch.Tensor, views: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Returns a row for each image, float64 `[B, 5]`.

    Its columns are the predicted class and its probability, the label's probability and loss, and the class that is
    predicted with views.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    best, predicted = log_probabilities.max(dim=1)
    of_label = log_probabilities.gather(1, labels[:, None])[:, 0]
    with_views = predicted if views is None else views.argmax(dim=1)
    columns = (predicted, best.exp(), of_label.exp(), -of_label, with_views)
    return torch.stack([column.double() for column in columns], dim=1)


def _in_parts(
    predict: Predict, predict_with_views: Predict | None, pixels: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Computes a chunk in parts that fit in the device's memory.

    Args:
        size: images of the first parts to try; parts that do not fit are halved.

    Returns:
        The logits of one view and those of several, float32 `[B, classes]`, and the size of the parts that fit.

    Raises:
        torch.OutOfMemoryError: a single image does not fit.
    """
    while True:
        try:
            parts = pixels.split(size)
            one = torch.cat([predict(part).float() for part in parts])
            views = None if predict_with_views is None else torch.cat([predict_with_views(part) for part in parts])
            return one, views, size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2  # outside of the except clause, whose error keeps the tensors of the failed forward pass


def _waiting_for(chunks: Iterator[torch.Tensor], activity: Activity) -> Iterator[torch.Tensor]:
    """Yields the chunks; a rank that waits for files, which may be on a slow disk, does not hang."""
    while True:
        with activity.slow_phase():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk
