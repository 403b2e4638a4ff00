"""The parity check: every exported format must give the outputs of the trained model at every batch size.

The reference is the trained model itself, in float32 on the CPU. This module sees a format as a function from images to
logits and probabilities and knows nothing else about it. A `ParityPlan` bounds the time.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from convoy.cpus import num_available_cpus
from trainer.errors import ExportError, first_line
from trainer.export.formats import FloatArray, Predictor
from trainer.export.parity_images import ParityImages

SMALL_BATCHES = (17, 3, 2, 1)
TOLERANCE = 1e-4
"""Largest accepted difference of a logit or a probability, where no logit is larger than `USUAL_LOGIT`."""
USUAL_LOGIT = 10.0
"""Up to this size float32 rounds well below the tolerance: a deep network rounds to a few millionths of its logits."""


class DifferenceError(ExportError):
    """A format's outputs differ from the trained model's. Exit code 6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityPlan:
    """Numbers of images and time limits of the parity check. No batch begins after the time limit of its stage.

    Args:
        name: as in the manifest.
        sample_size: number of parity images; all validation images are among them.
        num_images_of_small_batches: parity images at the batch sizes below the largest; None for all.
        reference_s: limit for the trained model; None for no limit, here and below.
        served_s: limit for the file that is served, at the largest batch size: it computes the accuracy.
        largest_s: limit for each other file at the largest batch size.
        small_s: limit for each file and each batch size below the largest.
    """

    name: str
    sample_size: int
    num_images_of_small_batches: int | None
    reference_s: float | None
    served_s: float | None
    largest_s: float | None
    small_s: float


QUICK = ParityPlan(
    name="default",
    sample_size=1_000,
    num_images_of_small_batches=256,
    reference_s=3.0,
    served_s=20.0,
    largest_s=2.0,
    small_s=0.5,
)
"""Takes less than a minute for a ResNet-18 on two cores, conversion included. A fault that depends on the batch size
shows in the first batch; one that depends on the image needs many images, which the largest batches compute fastest."""
THOROUGH = ParityPlan(
    name="thorough",
    sample_size=10_000,
    num_images_of_small_batches=None,
    reference_s=None,
    served_s=None,
    largest_s=None,
    small_s=60.0,
)
"""Takes over 15 minutes for a ResNet-18 on two cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """The outcome for one format at one batch size, as the manifest records it.

    Args:
        largest_difference: over all logits and probabilities.
        near_ties: images that the format assigns to another class than the reference does, although the reference's two
            largest logits differ by no more than the tolerance.
    """

    batch_size: int
    num_images: int
    largest_difference: float
    near_ties: int


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Sets torch's number of threads and restores it at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def reference_logits(
    model: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor], limit_s: float | None = None
) -> FloatArray:
    """Returns a model's logits, float32 `[N, classes]`, for batches of images uint8 `[B, C, H, W]`.

    Args:
        limit_s: no batch begins after so many seconds.
    """
    logits: FloatArray = torch.cat([model(images).cpu() for images in _within(limit_s, batches)]).numpy()
    return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCheck:
    """Compares exported files with the trained model.

    Args:
        reference: logits of the trained model for the first of these images, float32 `[N, classes]`.
        log: prints a line for the user with the file that is being checked.
        tolerance: largest accepted difference of a logit or a probability.
    """

    images: ParityImages
    reference: FloatArray
    plan: ParityPlan
    log: Callable[[str], None]
    tolerance: float

    def run(
        self, name: str, predict: Predictor, largest: tuple[FloatArray, FloatArray] | None = None
    ) -> list[ParityResult]:
        """Compares a file with the reference at every batch size.

        Args:
            name: the file's name, for the error message.
            largest: the result of `compute` for the largest batch size, if it has been called.

        Raises:
            ExportError: an output differs by more than the tolerance. The message names the file, the batch size, the
                image and both values.
        """
        num_images, largest_batch = len(self.reference), self.images.largest_batch
        outputs = largest or self.compute(name, predict, largest_batch, num_images, self.plan.largest_s)
        results = [self._compare(name, largest_batch, outputs)]
        num_images = min(num_images, self.plan.num_images_of_small_batches or num_images)
        for size in (size for size in SMALL_BATCHES if size < largest_batch):
            outputs = self.compute(name, predict, size, num_images, self.plan.small_s)
            results.append(self._compare(name, size, outputs))
        return results

    def compute(
        self, name: str, predict: Predictor, batch_size: int, num_images: int, limit_s: float | None
    ) -> tuple[FloatArray, FloatArray]:
        """Returns a file's logits and probabilities for the first parity images, both `[N, classes]`.

        N is `num_images`, or fewer if the time limit comes first.

        Raises:
            ExportError: the file does not run at this batch size, or returns outputs of another shape or type.
        """
        subject = f"{name} at batch size {batch_size}"
        outputs = []
        done = 0
        # For small batches a layer takes microseconds, and synchronising threads after each costs more than it saves.
        with torch_threads(num_available_cpus() if batch_size == self.images.largest_batch else 1):
            for images in _within(limit_s, self.images.batches(batch_size, num_images)):
                self.log(f"checking {subject}: image {done + 1:,} of up to {num_images:,}")
                outputs.append(self._predict(subject, predict, images))
                done += len(images)
        logits, probabilities = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return logits, probabilities

    def _predict(self, subject: str, predict: Predictor, images: torch.Tensor) -> tuple[FloatArray, FloatArray]:
        try:
            outputs = predict(images.numpy())
        except Exception as error:  # the runtimes' errors have no common base class
            raise ExportError(f"{subject} does not run: {first_line(error)}") from error
        expected = (len(images), self.reference.shape[1])
        for output in outputs:
            if output.shape != expected or output.dtype != np.float32:
                raise ExportError(
                    f"{subject} returns {output.dtype} {list(output.shape)} instead of float32 {list(expected)}"
                )
        return outputs

    def _compare(self, name: str, batch_size: int, outputs: tuple[FloatArray, FloatArray]) -> ParityResult:
        """Compares a file's outputs with the reference, as far as there are both."""
        num_images = min(len(outputs[0]), len(self.reference))
        logits, probabilities, reference = (values[:num_images] for values in (*outputs, self.reference))
        comparison = _OutputComparison(f"{name} at batch size {batch_size}", self.images, self.tolerance)
        near_ties = comparison.check_classes(logits, reference)
        differences = (
            comparison.check_values("logit", logits, reference),
            comparison.check_values("probability", probabilities, _softmax(reference)),
        )
        return ParityResult(
            batch_size=batch_size, num_images=num_images, largest_difference=max(differences), near_ties=near_ties
        )


def _within(limit_s: float | None, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields batches until the time limit, and at least one."""
    start = time.monotonic()
    for images in batches:
        yield images
        if limit_s is not None and time.monotonic() - start > limit_s:
            return


@dataclass(frozen=True, slots=True)
class _OutputComparison:
    """Compares outputs with the reference.

    Args:
        subject: the file and the batch size, with which each error message begins.
    """

    subject: str
    images: ParityImages
    tolerance: float

    def check_classes(self, logits: FloatArray, reference: FloatArray) -> int:
        """Returns the number of near ties that fell to another class."""
        predicted, expected = logits.argmax(axis=1), reference.argmax(axis=1)
        differing = np.flatnonzero(predicted != expected)
        second, first = np.partition(reference[differing], -2, axis=1)[:, -2:].T
        for image in differing[~(first - second <= self.tolerance)][:1]:
            a, b = expected[image], predicted[image]
            raise DifferenceError(
                f"{self.subject} assigns {self.images.describe(image)} to class {b} (logits {b} and {a}: "
                f"{logits[image, b]:.6g} and {logits[image, a]:.6g}), the trained model to class {a} "
                f"({reference[image, b]:.6g} and {reference[image, a]:.6g})"
            )
        return len(differing)

    def check_values(self, kind: str, values: FloatArray, expected: FloatArray) -> float:
        """Returns the largest difference."""
        difference = np.abs(values - expected)
        for image, column in np.argwhere(~(difference <= self.tolerance))[:1]:  # not `>`, which is false for NaN
            raise DifferenceError(
                f"{self.subject} returns {kind} {column} = {values[image, column]:.6g} for "
                f"{self.images.describe(image)}, the trained model {expected[image, column]:.6g}: they differ by more "
                f"than {self.tolerance:.2g}"
            )
        return float(difference.max())


def _softmax(logits: FloatArray) -> FloatArray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax: FloatArray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return softmax
