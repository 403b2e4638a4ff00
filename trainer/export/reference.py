"""The trained model that exported files are compared with, and its outputs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trainer.evaluation.views import average_views
from trainer.export.folding import ExportModule, fold
from trainer.export.formats import FloatArray
from trainer.export.golden import golden_images
from trainer.export.parity import TOLERANCE, USUAL_LOGIT, ParityPlan, reference_logits
from trainer.export.parity_images import ParityImages
from trainer.hardware import without_tf32
from trainer.loop.run import Run
from trainer.models import Classifier
from trainer.recipes import TestTimeViews
from trainer.records.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """A run's trained model on the CPU, with its outputs for the parity images and for the golden batch.

    Args:
        classifier: a copy of the run's, on the CPU, in evaluation mode.
        views: the views of each image that the exported model averages.
        logits: float32 `[N, classes]`, for the first parity images.
        golden: images uint8 `[G, C, H, W]`, and logits float32 `[G, classes]` for them.
        result: the content of `result.json`; None if the run has no result yet.
    """

    run: Run
    classifier: Classifier
    views: TestTimeViews
    parity_images: ParityImages
    logits: FloatArray
    golden: tuple[torch.Tensor, FloatArray]
    result: Result | None

    @classmethod
    def from_run(
        cls, run: Run, result: Result | None, plan: ParityPlan, views: TestTimeViews, log: Callable[[str], None]
    ) -> "ReferenceModel":
        """Copies a run's model to the CPU and computes its outputs, within the plan's time."""
        classifier = copy_of_model(run)
        validation, training = (run.validation_images, run.validation_indices), (run.dataset.train, run.train_indices)
        parity_images = ParityImages(validation, training, plan.sample_size)
        golden = golden_images(run.dataset.train, run.train_indices)

        def predict(images: torch.Tensor) -> torch.Tensor:
            log("computing the outputs of the trained model")
            return average_views(classifier, images, views)

        return cls(
            run=run,
            classifier=classifier,
            views=views,
            parity_images=parity_images,
            logits=reference_logits(
                predict, parity_images.batches(parity_images.largest_batch, len(parity_images)), plan.reference_s
            ),
            golden=(golden, reference_logits(predict, [golden])),
            result=result,
        )

    def logits_on_gpu(self, device: torch.device) -> FloatArray | None:
        """Returns the logits of all parity images, or None if the GPU has too little memory left."""
        try:
            with without_tf32():
                classifier = copy.deepcopy(self.classifier).to(device)
                return reference_logits(
                    lambda images: average_views(classifier, images.to(device), self.views),
                    self.parity_images.batches(self.parity_images.largest_batch, len(self.parity_images)),
                )
        except torch.OutOfMemoryError:
            return None

    @property
    def tolerance(self) -> float:
        """Largest accepted difference of a logit or a probability."""
        return tolerance_of(self.logits, self.golden[1])

    def export_module(self) -> tuple[ExportModule, torch.Tensor]:
        """Returns the module to convert, and an example of its input."""
        return fold(self.classifier, self.views), torch.zeros_like(self.golden[0][:2])

    def calibration_images(self, num_images: int) -> torch.Tensor:
        """Returns evenly spread training images, uint8 `[num_images, C, H, W]`, or all if there are fewer."""
        indices = self.run.train_indices
        spread = torch.linspace(0, len(indices) - 1, min(num_images, len(indices)))
        return self.run.dataset.train.take(indices[spread.long()])


def copy_of_model(run: Run) -> Classifier:
    """Returns a copy of a run's model on the CPU, in evaluation mode."""
    return copy.deepcopy(run.learner.model).cpu().eval()


def tolerance_of(*logits: FloatArray) -> float:
    """Returns the largest accepted difference of a logit or a probability: large logits are rounded in proportion."""
    return TOLERANCE * max(1.0, max(float(np.abs(each).max()) for each in logits) / USUAL_LOGIT)


def largest_difference(a: FloatArray, b: FloatArray) -> float:
    return float(np.abs(a - b).max())
