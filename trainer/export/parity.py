"""The gate: what is exported answers as the trained model does, in every format and at every batch size, or stays out.

The reference is the model itself, in float32 on the CPU. Knows formats only as functions from images to answers.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from convoy.cpus import num_available_cpus
from trainer.data import ImageSet
from trainer.errors import ExportError
from trainer.export.formats import Answer, Floats

NUM_IMAGES = 10_000
"""Looked at where the data set has so many; all validation images, where they are more."""
LARGEST_BATCH = 256
BATCH_SIZES = (LARGEST_BATCH, 17, 3, 2, 1)
PATIENCE_S = 60.0
"""At a size but the largest: one image at a time, 10,000 take a ResNet a quarter of an hour in each format."""
TOLERANCE = 1e-4
"""Largest difference of a logit or a probability."""


class ParitySample:
    """The images that the gate looks at: all validation images, and training images up to 10,000 in all.

    Never test images. They are read where they lie, a batch at a time.
    """

    def __init__(self, validation: tuple[ImageSet, torch.Tensor], training: tuple[ImageSet, torch.Tensor]) -> None:
        num_more = min(len(training[1]), max(0, NUM_IMAGES - len(validation[1])))
        # Evenly spread: folders of images are sorted by class.
        spread = torch.linspace(0, len(training[1]) - 1, num_more).long()
        self._parts = (("validation", *validation), ("training", training[0], training[1][spread]))
        self.num_validation = len(validation[1])
        self.labels = torch.cat([images.labels[indices] for _, images, indices in self._parts]).numpy()
        """int64 `[N]`, validation images first."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, num_images: int) -> Iterator[torch.Tensor]:
        """The first images, uint8 `[size, C, H, W]`; the last batch may be smaller."""
        for start in range(0, num_images, size):
            yield torch.cat(list(self._between(start, min(start + size, num_images))))

    def describe(self, position: int) -> str:
        """The image at a position as `training image 123`: its index in the data set."""
        for name, _, indices in self._parts:
            if position < len(indices):
                return f"{name} image {int(indices[position])}"
            position -= len(indices)
        raise IndexError(position)

    def _between(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        for _, images, indices in self._parts:
            yield images.images[indices[max(0, start) : max(0, stop)]]
            start, stop = start - len(indices), stop - len(indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """How one format at one batch size agreed with the reference; what the manifest says of it.

    Args:
        largest_difference: of any logit or probability.
        near_ties: images taken for another class than by the reference, whose two largest logits there lie within the
            tolerance of each other.
    """

    batch_size: int
    num_images: int
    largest_difference: float
    near_ties: int


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch compute on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def reference_logits(model: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]) -> Floats:
    """float32 `[N, classes]`: what the trained model says of images uint8 `[B, C, H, W]`, a batch at a time."""
    logits: Floats = torch.cat([model(images) for images in batches]).numpy()
    return logits


def check_parity(
    name: str, answer: Answer, sample: ParitySample, reference: Floats, tolerance: float = TOLERANCE
) -> list[ParityResult]:
    """Compare a format with the reference at every batch size: on the whole sample, or as much as a minute allows.

    Raises:
        ExportError: they differ; the message names the format, the batch size, the image and both logits.
    """
    return [
        _Comparison(f"{name} at batch size {size}", sample, reference, tolerance).of(answer, size)
        for size in BATCH_SIZES
    ]


def ask(answer: Answer, sample: ParitySample, batch_size: int, num_images: int) -> tuple[Floats, Floats]:
    """Logits and probabilities, `[N, classes]`, of the first images: `num_images`, or fewer where they take long."""
    answers = []
    until = math.inf if batch_size == LARGEST_BATCH else time.monotonic() + PATIENCE_S
    # Threads that wait for each other after every layer cost more than they save where a layer takes microseconds.
    with torch_threads(num_available_cpus() if batch_size == LARGEST_BATCH else 1):
        for images in sample.batches(batch_size, num_images):
            answers.append(answer(images.numpy()))
            if any(len(output) != len(images) for output in answers[-1]):
                raise ValueError(
                    f"{len(images)} images got {', '.join(str(len(output)) for output in answers[-1])} answers"
                )
            if time.monotonic() > until:
                break
    logits, probabilities = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    return logits, probabilities


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Of one format at one batch size with the reference.

    Args:
        where: begins each complaint.
        reference: logits float32 `[N, classes]` of the sample.
    """

    where: str
    sample: ParitySample
    reference: Floats
    tolerance: float

    def of(self, answer: Answer, batch_size: int) -> ParityResult:
        logits, probabilities = self._ask(answer, batch_size)
        reference = self.reference[: len(logits)]
        near_ties = self._check_classes(logits, reference)
        differences = (
            self._check_values("logit", logits, reference),
            self._check_values("probability", probabilities, _softmax(reference)),
        )
        return ParityResult(
            batch_size=batch_size, num_images=len(logits), largest_difference=max(differences), near_ties=near_ties
        )

    def _ask(self, answer: Answer, batch_size: int) -> tuple[Floats, Floats]:
        try:
            outputs = ask(answer, self.sample, batch_size, len(self.reference))
        except Exception as error:  # the runtimes' errors have no common root
            raise ExportError(f"{self.where} does not run: {str(error).strip().splitlines()[0]}") from error
        expected = (len(outputs[0]), self.reference.shape[1])
        for output in outputs:
            if output.shape != expected or output.dtype != np.float32:
                raise ExportError(
                    f"{self.where} gives {output.dtype} {list(output.shape)}, not float32 {list(expected)}"
                )
        return outputs

    def _check_classes(self, logits: Floats, reference: Floats) -> int:
        """How many images are taken for another class because of a near tie."""
        given, expected = logits.argmax(axis=1), reference.argmax(axis=1)
        differing = np.flatnonzero(given != expected)
        second, first = np.partition(reference[differing], -2, axis=1)[:, -2:].T
        for image in differing[~(first - second <= self.tolerance)][:1]:
            ours, theirs = reference[image], logits[image]
            a, b = expected[image], given[image]
            raise ExportError(
                f"{self.where} takes {self.sample.describe(image)} for class {b} (logits {b} and {a}: {theirs[b]:.6g} "
                f"and {theirs[a]:.6g}), the trained model for class {a} ({ours[b]:.6g} and {ours[a]:.6g})"
            )
        return len(differing)

    def _check_values(self, what: str, given: Floats, expected: Floats) -> float:
        """The largest difference."""
        difference = np.abs(given - expected)
        for image, column in np.argwhere(~(difference <= self.tolerance))[:1]:  # in these words because of NaN
            raise ExportError(
                f"{self.where} answers {self.sample.describe(image)} with {what} {column} = "
                f"{given[image, column]:.6g}, the trained model with {expected[image, column]:.6g}: more than "
                f"{self.tolerance:.2g} apart"
            )
        return float(difference.max())


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax: Floats = powers / powers.sum(axis=1, keepdims=True)
    return softmax
