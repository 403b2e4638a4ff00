"""The trained model that exported files are compared with, and its outputs."""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from trainer.export.folding import ExportModule, fold
from trainer.export.formats import FloatArray
from trainer.export.golden import golden_images
from trainer.export.parity import ParitySample, reference_logits
from trainer.export.repository import MAX_BATCH_SIZE
from trainer.loop.run import Run
from trainer.models import Classifier
from trainer.records.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """A run's trained model on the CPU, with its outputs for the parity sample and for the golden batch.

    Args:
        classifier: a copy of the run's, on the CPU, float32, in evaluation mode.
        logits: float32 `[N, classes]`, for the sample.
        golden: images uint8 `[G, C, H, W]`, and logits float32 `[G, classes]` for them.
        result: what `result.json` holds or will hold; None if the run has no result yet.
    """

    run: Run
    classifier: Classifier
    sample: ParitySample
    logits: FloatArray
    golden: tuple[torch.Tensor, FloatArray]
    result: Result | None

    @classmethod
    def from_run(cls, run: Run, result: Result | None) -> "ReferenceModel":
        """Copies a run's model to the CPU and computes its outputs."""
        classifier: Classifier = copy.deepcopy(run.learner.model).cpu().float().eval()
        sample = ParitySample((run.validation_images, run.validation_indices), (run.dataset.train, run.train_indices))
        golden = golden_images(run.dataset.train, run.train_indices)
        return cls(
            run=run,
            classifier=classifier,
            sample=sample,
            logits=reference_logits(classifier, sample.batches(MAX_BATCH_SIZE, len(sample))),
            golden=(golden, reference_logits(classifier, [golden])),
            result=result,
        )

    def export_module(self) -> tuple[ExportModule, torch.Tensor]:
        """Returns the module to convert, and an example of its input."""
        return fold(self.classifier), torch.zeros_like(self.golden[0][:2])

    def calibration_images(self, num_images: int) -> torch.Tensor:
        """Returns evenly spread training images, uint8 `[num_images, C, H, W]`, or all if there are fewer."""
        indices = self.run.train_indices
        spread = torch.linspace(0, len(indices) - 1, min(num_images, len(indices)))
        return self.run.dataset.train.images[indices[spread.long()]]

    def count_errors(self, logits: FloatArray) -> int:
        """Returns the number of misclassified validation images.

        Args:
            logits: `[N, classes]` for the sample, or for its validation images alone.
        """
        num_images = self.sample.num_validation
        return int((logits[:num_images].argmax(axis=1) != self.sample.labels[:num_images]).sum())


def largest_difference(a: FloatArray, b: FloatArray) -> float:
    return float(np.abs(a - b).max())
