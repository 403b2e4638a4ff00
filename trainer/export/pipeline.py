"""An export, as a table of contents: prepare -> convert -> check parity -> publish."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.evaluate import wilson_interval
from trainer.export.folding import fold
from trainer.export.formats import Answer, Floats, convert, open_format
from trainer.export.manifest import GOLDEN, golden_file, golden_images, manifest
from trainer.export.parity import (
    LARGEST_BATCH,
    SMALL_BATCHES,
    TOLERANCE,
    Agreement,
    Sample,
    ask,
    check_parity,
    reference_logits,
)
from trainer.export.repository import ONNX, Model
from trainer.fit import Run
from trainer.hardware import num_available_cpus
from trainer.models import Classifier


def export(run: Run, model: Model, result: dict[str, Any] | None) -> Path:
    """Publish a run's weights as the next version of a model; returns the version's folder.

    Args:
        result: what `result.json` holds or is about to hold; None where the run has no result yet.

    Raises:
        ConfigError: a model with other classes, inputs or outputs has this name already.
        ExportError: a format answers otherwise than the trained model, or the repository cannot be written.
    """
    model.check()
    run.progress.say(f"exporting {model.name}: ONNX, TorchScript, torch.export")
    with _all_cpus():
        trained = Trained.prepare(run)
        files = convert(fold(trained.classifier), torch.zeros(2, *model.image_shape, dtype=torch.uint8))
        formats = {name: open_format(name, content) for name, content in files.items()}
        parity = {name: check_parity(name, answer, trained.sample, trained.logits) for name, answer in formats.items()}
        findings = {
            "golden_tolerance": TOLERANCE,
            "metrics": trained.metrics(formats[ONNX], result),
            "parity": trained.describe_parity(parity),
        }
    run.progress.say(_summary(parity, len(trained.sample)))
    return publish(trained, model, files, findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The model as it was trained, and what it says of the images by which what is exported is judged.

    Args:
        classifier: a copy on the CPU, float32, in evaluation mode.
        logits: float32 `[N, classes]`, the classifier's of the sample.
    """

    run: Run
    classifier: Classifier
    sample: Sample
    logits: Floats

    @classmethod
    def prepare(cls, run: Run) -> "Trained":
        classifier: Classifier = copy.deepcopy(run.learner.model).cpu().float().eval()
        sample = Sample((run.validation_images, run.validation_indices), (run.dataset.train, run.train_indices))
        logits = reference_logits(classifier, sample.batches(LARGEST_BATCH, len(sample)))
        return cls(run=run, classifier=classifier, sample=sample, logits=logits)

    def metrics(self, answer: Answer, result: dict[str, Any] | None) -> dict[str, Any]:
        """How good the exported model is, beside what the run found, which may have looked at several views."""
        num_images = self.sample.num_validation
        logits, _ = ask(answer, self.sample, LARGEST_BATCH, num_images)
        num_errors = int((logits.argmax(axis=1) != self.sample.labels[:num_images]).sum())
        known = ("val_accuracy", "test_accuracy", "test_errors", "num_test", "test_look", "precision")
        return {
            "val_accuracy": 1 - num_errors / max(1, num_images),
            "val_errors": num_errors,
            "num_val": num_images,
            "val_interval": wilson_interval(num_images - num_errors, num_images),
            "views": "one",
            "run": result and {name: result[name] for name in known} | {"views": self.run.recipe.test_time_views},
        }

    def describe_parity(self, agreements: dict[str, list[Agreement]]) -> dict[str, Any]:
        """What was compared, and how well it agreed."""
        return {
            "reference": "the trained model, eager, float32, on the CPU",
            "tolerance": TOLERANCE,
            "num_validation_images": self.sample.num_validation,
            "num_training_images": len(self.sample) - self.sample.num_validation,
            "formats": {name: [asdict(agreement) for agreement in found] for name, found in agreements.items()},
        }


def publish(trained: Trained, model: Model, files: dict[str, bytes], findings: dict[str, Any]) -> Path:
    """Add the golden batch and the manifest, and make it all the model's next version."""
    golden = golden_images(trained.run.dataset.train, trained.run.train_indices)
    files = files | {GOLDEN: golden_file(golden, reference_logits(trained.classifier, [golden]))}
    describe = partial(
        manifest, model=model, classifier=trained.classifier, files=files, run=trained.run, findings=findings
    )
    version = model.publish(files, describe)
    trained.run.progress.say(
        f"exported to {version}; serve it: python -m serving --model-repository {model.repository}"
    )
    return version


def _summary(parity: dict[str, list[Agreement]], num_images: int) -> str:
    agreements = [agreement for found in parity.values() for agreement in found]
    largest = max(agreement.largest_difference for agreement in agreements)
    ties = sum(agreement.near_ties for agreement in agreements)
    sizes = ", ".join(str(size) for size in sorted((*SMALL_BATCHES, LARGEST_BATCH)))
    return (
        f"all formats answer {num_images:,} images as the trained model does, in batches of {sizes}: largest "
        f"difference {largest:.1e}, {ties} near ties"
    )


@contextlib.contextmanager
def _all_cpus() -> Iterator[None]:
    """Let torch compute on all CPUs of the container; the other ranks are at rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_available_cpus())
    try:
        yield
    finally:
        torch.set_num_threads(before)
