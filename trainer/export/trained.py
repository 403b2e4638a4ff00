"""The model as it was trained, and what it says of the images by which whatever is exported is judged."""

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.evaluation.intervals import wilson_interval
from trainer.export.folding import ServedModel, fold
from trainer.export.formats import Floats
from trainer.export.manifest import golden_file, golden_images, manifest
from trainer.export.parity import LARGEST_BATCH, ParityResult, ParitySample, reference_logits
from trainer.export.repository import GOLDEN, Model
from trainer.loop.fit import Run
from trainer.models import Classifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run's weights, ready to be exported.

    Args:
        classifier: a copy on the CPU, float32, in evaluation mode.
        logits: float32 `[N, classes]`, the classifier's of the sample.
        golden: images uint8 `[N, C, H, W]`, and the classifier's logits of them.
        result: what `result.json` holds or is about to hold; None where the run has no result yet.
    """

    run: Run
    classifier: Classifier
    sample: ParitySample
    logits: Floats
    golden: tuple[torch.Tensor, Floats]
    result: dict[str, Any] | None

    @classmethod
    def prepare(cls, run: Run, result: dict[str, Any] | None) -> "Trained":
        classifier: Classifier = copy.deepcopy(run.learner.model).cpu().float().eval()
        sample = ParitySample((run.validation_images, run.validation_indices), (run.dataset.train, run.train_indices))
        golden = golden_images(run.dataset.train, run.train_indices)
        return cls(
            run=run,
            classifier=classifier,
            sample=sample,
            logits=reference_logits(classifier, sample.batches(LARGEST_BATCH, len(sample))),
            golden=(golden, reference_logits(classifier, [golden])),
            result=result,
        )

    def served(self) -> tuple[ServedModel, torch.Tensor]:
        """What is converted, and an example of its input."""
        return fold(self.classifier), torch.zeros_like(self.golden[0][:2])

    def training_images(self, num_images: int) -> torch.Tensor:
        """Training images, evenly spread, uint8 `[num_images, C, H, W]`; fewer where there are fewer."""
        spread = torch.linspace(0, len(self.run.train_indices) - 1, min(num_images, len(self.run.train_indices)))
        return self.run.dataset.train.images[self.run.train_indices[spread.long()]]

    def num_errors(self, logits: Floats) -> int:
        """Validation images taken for a wrong class, by logits of the sample."""
        num_images = self.sample.num_validation
        return int((logits[:num_images].argmax(axis=1) != self.sample.labels[:num_images]).sum())

    def metrics(self, logits: Floats) -> dict[str, Any]:
        """How good the exported model is by its logits of the sample, beside what the run found.

        The run may have averaged over several views of an image; what is exported looks at each image once.
        """
        num_images, num_errors = self.sample.num_validation, self.num_errors(logits)
        known = ("val_accuracy", "test_accuracy", "test_errors", "num_test", "test_look", "precision")
        views = {"test_time_views": self.run.recipe.test_time_views}
        return {
            "val_accuracy": 1 - num_errors / max(1, num_images),
            "val_errors": num_errors,
            "num_val": num_images,
            "val_interval": wilson_interval(num_images - num_errors, num_images),
            "test_time_views": "one",
            "run": {name: self.result[name] for name in known} | views if self.result else None,
        }

    def parity(self, agreements: dict[str, list[ParityResult]], tolerance: float) -> dict[str, Any]:
        """What was compared, and how well it agreed."""
        return {
            "reference": "the trained model, eager, float32, on the CPU",
            "tolerance": tolerance,
            "num_validation_images": self.sample.num_validation,
            "num_training_images": len(self.sample) - self.sample.num_validation,
            "formats": {name: [asdict(agreement) for agreement in found] for name, found in agreements.items()},
        }

    def publish(self, model: Model, files: dict[str, bytes], findings: dict[str, Any]) -> Path:
        """Add the golden batch and the manifest, and make it all the model's next version.

        Args:
            findings: what the manifest says of how good the files are, and how that was seen.

        Raises:
            ConfigError: a model with other classes, inputs or outputs has this name already.
            ExportError: the repository cannot be written.
        """
        files = files | {GOLDEN: golden_file(*self.golden)}
        version = model.publish(
            files,
            partial(manifest, model=model, classifier=self.classifier, files=files, run=self.run, findings=findings),
        )
        self.run.progress.say(
            f"exported to {version}; serve it: python -m serving --model-repository {model.repository}"
        )
        return version


def largest_difference(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).max())
