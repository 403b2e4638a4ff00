"""The parity check: every exported format must give the outputs of the trained model at every batch size.

The reference is the trained model itself, in float32 on the CPU. This module sees a format as a function from images to
logits and probabilities and knows nothing else about it.
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
from trainer.export.formats import FloatArray, Predictor
from trainer.export.repository import MAX_BATCH_SIZE

SAMPLE_SIZE = 10_000
"""Images that are compared, where the data set has that many. All validation images are, even if there are more."""
BATCH_SIZES = (MAX_BATCH_SIZE, 17, 3, 2, 1)
TIME_LIMIT_S = 60.0
"""Limit for each batch size but the largest: a ResNet takes 15 minutes for 10,000 images, one at a time."""
TOLERANCE = 1e-4
"""Largest accepted difference of a logit or a probability."""


class ParitySample:
    """The images that are compared: all validation images, then training images up to `SAMPLE_SIZE` in all.

    It holds no test images, and reads images a batch at a time.

    Args:
        validation: the images, and the indices of those that are set aside for validation.
        training: the images, and the indices of those that the model was trained on.
    """

    def __init__(self, validation: tuple[ImageSet, torch.Tensor], training: tuple[ImageSet, torch.Tensor]) -> None:
        num_training = min(len(training[1]), max(0, SAMPLE_SIZE - len(validation[1])))
        # Evenly spread, because folders of images are sorted by class.
        spread = torch.linspace(0, len(training[1]) - 1, num_training).long()
        self._parts = (("validation", *validation), ("training", training[0], training[1][spread]))
        self.num_validation = len(validation[1])
        self.labels = torch.cat([images.labels[indices] for _, images, indices in self._parts]).numpy()
        """Int64 `[N]`, validation images first."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, num_images: int) -> Iterator[torch.Tensor]:
        """Yields the first `num_images` images, uint8 `[size, C, H, W]`; the last batch may be smaller."""
        for start in range(0, num_images, size):
            yield torch.cat(list(self._slices(start, min(start + size, num_images))))

    def describe(self, position: int) -> str:
        """Returns, for example, `training image 123`, where 123 is the image's index in the data set."""
        for name, _, indices in self._parts:
            if position < len(indices):
                return f"{name} image {int(indices[position])}"
            position -= len(indices)
        raise IndexError(position)

    def _slices(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        for _, images, indices in self._parts:
            yield images.images[indices[max(0, start) : max(0, stop)]]
            start, stop = start - len(indices), stop - len(indices)


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
def reference_logits(model: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]) -> FloatArray:
    """Returns the trained model's logits, float32 `[N, classes]`, for batches of images uint8 `[B, C, H, W]`."""
    logits: FloatArray = torch.cat([model(images) for images in batches]).numpy()
    return logits


def check_parity(
    name: str, predict: Predictor, sample: ParitySample, reference: FloatArray, tolerance: float = TOLERANCE
) -> list[ParityResult]:
    """Compares a format with the reference at every batch size, on the whole sample or for `TIME_LIMIT_S`.

    Args:
        name: the format's file name, for the error message.
        reference: logits of the trained model for the sample, float32 `[N, classes]`.

    Raises:
        ExportError: an output differs by more than the tolerance. The message names the format, the batch size, the
            image and both values.
    """
    return [
        _Comparison(f"{name} at batch size {size}", sample, reference, tolerance).run(predict, size)
        for size in BATCH_SIZES
    ]


def run_inference(
    predict: Predictor, sample: ParitySample, batch_size: int, num_images: int
) -> tuple[FloatArray, FloatArray]:
    """Returns logits and probabilities, both `[N, classes]`, for the first images of the sample.

    N is `num_images`, or fewer if a batch size below `MAX_BATCH_SIZE` takes longer than `TIME_LIMIT_S`.

    Raises:
        ValueError: a batch gave more or fewer outputs than it has images.
    """
    outputs = []
    deadline = math.inf if batch_size == MAX_BATCH_SIZE else time.monotonic() + TIME_LIMIT_S
    # For small batches a layer takes microseconds, and synchronising threads after each costs more than it saves.
    with torch_threads(num_available_cpus() if batch_size == MAX_BATCH_SIZE else 1):
        for images in sample.batches(batch_size, num_images):
            outputs.append(predict(images.numpy()))
            if any(len(output) != len(images) for output in outputs[-1]):
                raise ValueError(
                    f"{len(images)} images gave {' and '.join(str(len(output)) for output in outputs[-1])} outputs"
                )
            if time.monotonic() > deadline:
                break
    logits, probabilities = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    return logits, probabilities


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Compares one format at one batch size with the reference.

    Args:
        subject: the format and the batch size, with which each error message begins.
        reference: logits float32 `[N, classes]` of the sample.
    """

    subject: str
    sample: ParitySample
    reference: FloatArray
    tolerance: float

    def run(self, predict: Predictor, batch_size: int) -> ParityResult:
        logits, probabilities = self._run_inference(predict, batch_size)
        reference = self.reference[: len(logits)]
        near_ties = self._check_classes(logits, reference)
        differences = (
            self._check_values("logit", logits, reference),
            self._check_values("probability", probabilities, _softmax(reference)),
        )
        return ParityResult(
            batch_size=batch_size, num_images=len(logits), largest_difference=max(differences), near_ties=near_ties
        )

    def _run_inference(self, predict: Predictor, batch_size: int) -> tuple[FloatArray, FloatArray]:
        try:
            outputs = run_inference(predict, self.sample, batch_size, len(self.reference))
        except Exception as error:  # the runtimes' errors have no common base class
            raise ExportError(f"{self.subject} does not run: {str(error).strip().splitlines()[0]}") from error
        expected = (len(outputs[0]), self.reference.shape[1])
        for output in outputs:
            if output.shape != expected or output.dtype != np.float32:
                raise ExportError(
                    f"{self.subject} returns {output.dtype} {list(output.shape)} instead of float32 {list(expected)}"
                )
        return outputs

    def _check_classes(self, logits: FloatArray, reference: FloatArray) -> int:
        """Returns the number of near ties that fell to another class."""
        predicted, expected = logits.argmax(axis=1), reference.argmax(axis=1)
        differing = np.flatnonzero(predicted != expected)
        second, first = np.partition(reference[differing], -2, axis=1)[:, -2:].T
        for image in differing[~(first - second <= self.tolerance)][:1]:
            a, b = expected[image], predicted[image]
            raise ExportError(
                f"{self.subject} assigns {self.sample.describe(image)} to class {b} (logits {b} and {a}: "
                f"{logits[image, b]:.6g} and {logits[image, a]:.6g}), the trained model to class {a} "
                f"({reference[image, b]:.6g} and {reference[image, a]:.6g})"
            )
        return len(differing)

    def _check_values(self, kind: str, values: FloatArray, expected: FloatArray) -> float:
        """Returns the largest difference."""
        difference = np.abs(values - expected)
        for image, column in np.argwhere(~(difference <= self.tolerance))[:1]:  # not `>`, which is false for NaN
            raise ExportError(
                f"{self.subject} returns {kind} {column} = {values[image, column]:.6g} for "
                f"{self.sample.describe(image)}, the trained model {expected[image, column]:.6g}: they differ by more "
                f"than {self.tolerance:.2g}"
            )
        return float(difference.max())


def _softmax(logits: FloatArray) -> FloatArray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax: FloatArray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return softmax
