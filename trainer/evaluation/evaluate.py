"""Exact evaluation: whole numbers, summed once, the same for every world size.

The set is cut in chunks of a fixed size, whatever the number of ranks; each chunk is computed by one rank, and none
is padded (torch's DistributedSampler pads, which counts samples twice: https://github.com/pytorch/pytorch/issues/25162).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
import torch.nn.functional as F

from trainer.data import ImageSet
from trainer.ranks.world import World

CHUNK_SIZE = 500
"""Images a forward pass: small enough for the CPU's caches and large enough for a GPU."""

TestTimeViews = Literal["one", "shifted", "mirrored", "mirrored-and-shifted"]

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Logits float32 `[B, classes]` of pixels uint8 `[B, C, H, W]` on the model's device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model made of a set, image by image.

    Args:
        labels: int64 `[N]`.
        predicted: int64 `[N]`.
        confidence: float32 `[N]`, the probability given to the predicted class.
        label_probability: float32 `[N]`, the probability given to the right class.
        loss: mean cross-entropy, in nats.
    """

    labels: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor
    label_probability: torch.Tensor
    loss: float

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def num_errors(self) -> int:
        return int((self.predicted != self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Between 0 and 1; 0 of an empty set."""
        return 1 - self.num_errors / self.num_images if self.num_images else 0.0

    def confusion(self, num_classes: int) -> torch.Tensor:
        """int64 `[classes, classes]`: how often a label (row) was taken for a class (column)."""
        cells = self.labels * num_classes + self.predicted
        return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def evaluate(predict: Predict, images: ImageSet, indices: torch.Tensor | None, world: World) -> Evaluation:
    """Evaluate the images at `indices` (all if None), each on one rank; every rank gets the whole result."""
    if indices is None:
        indices = torch.arange(len(images.labels))
    # Columns: predicted, confidence, label's probability, loss. float64 holds each exactly, so that adding the zeros
    # of the other ranks changes nothing.
    table = torch.zeros(len(indices), 4, dtype=torch.float64)
    with world.watchdog.computing():
        for start in range(world.rank * CHUNK_SIZE, len(indices), world.size * CHUNK_SIZE):
            chunk = indices[start : start + CHUNK_SIZE]
            labels = images.labels[chunk].to(world.device)
            logits = predict(images.images[chunk].to(world.device)).float()
            log_probabilities = F.log_softmax(logits, dim=1)
            best, predicted = log_probabilities.max(dim=1)
            of_label = log_probabilities.gather(1, labels[:, None])[:, 0]
            columns = [predicted.double(), best.exp().double(), of_label.exp().double(), -of_label.double()]
            table[start : start + len(chunk)] = torch.stack(columns, dim=1).cpu()
        table = world.all_reduce_sum(table.to(world.device)).cpu()
    return Evaluation(
        labels=images.labels[indices],
        predicted=table[:, 0].long(),
        confidence=table[:, 1].float(),
        label_probability=table[:, 2].float(),
        loss=float(table[:, 3].mean()),
    )


def average_views(
    model: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, views: TestTimeViews
) -> torch.Tensor:
    """Logits float32 `[B, classes]` of pixels uint8 `[B, C, H, W]`, averaged over views of each image.

    `shifted` takes the image itself at twice the weight of each of its four neighbours, a pixel up, down, left and
    right. `mirrored` adds the mirror image. `mirrored-and-shifted` takes the image and its mirror at half the weight,
    and both shifted by one pixel up-left and down-right for the other half (six views: airbench, arXiv 2404.00498).
    """
    if views == "one":
        return model(pixels).float()
    if views == "mirrored":
        return (model(pixels).float() + model(pixels.flip(-1)).float()) / 2
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")

    def shifted(y: int, x: int, views: TestTimeViews) -> torch.Tensor:
        return average_views(model, padded[..., y : y + height, x : x + width], views)

    if views == "shifted":
        neighbours = [shifted(y, x, "one") for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
        return (2 * model(pixels).float() + sum(neighbours)) / 6
    corners = shifted(0, 0, "mirrored") + shifted(2, 2, "mirrored")
    return average_views(model, pixels, "mirrored") / 2 + corners / 4


def wilson_interval(num_right: int, num_all: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default (Wilson, JASA 22, 1927)."""
    if num_all == 0:
        return 0.0, 1.0
    p, n = num_right / num_all, num_all
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def level_of_look(look: int) -> float:
    """How sure the interval of a look is, the first being 1: 1 - 0.05 * 6 / (pi * look)^2.

    The shares of the 5 % add up to 5 % over all looks, however many there will be: so the intervals that were written
    hold together with 95 % (the union bound), and it does not matter which of the looks somebody picks, or when.
    """
    return 1 - 0.05 * 6 / (math.pi * look) ** 2


def interval_of_look(num_right: int, num_all: int, look: int) -> tuple[float, float]:
    """The Wilson interval at the level of that look."""
    return wilson_interval(num_right, num_all, NormalDist().inv_cdf((1 + level_of_look(look)) / 2))


def describe_accuracy(num_errors: int, num_images: int, look: int | None = None) -> str:
    """An accuracy as a line for people: with its counts and its interval, of 95 % or, on test images, of its look."""
    if num_images == 0:
        return "unknown (no images)"
    num_right, found = num_images - num_errors, f"{num_errors:,} of {num_images:,} wrong"
    if look is None:
        low, high = wilson_interval(num_right, num_images)
        interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    else:
        low, high = interval_of_look(num_right, num_images, look)
        interval = f"interval {100 * low:.2f} to {100 * high:.2f} %, 95 % over all looks"
    return f"{100 * (1 - num_errors / num_images):.2f} % ({found}; {interval})"
