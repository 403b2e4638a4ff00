"""Builds `manifest.json`: a version's files, inputs and outputs, accuracy, checks and origin."""

import datetime
import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from convoy.preprocessing import PREPROCESSING, Preprocessing
from trainer.evaluation.views import NUM_VIEWS, is_headline_averaged
from trainer.export.parity import ParityPlan, ParityResult
from trainer.export.quality import Correctness
from trainer.export.reference import ReferenceModel
from trainer.export.repository import INPUT, LOGITS, PROBABILITIES, RepositoryModel
from trainer.loop.run import Run
from trainer.recipes import TestTimeViews
from trainer.records.checkpoint import weights_sha256
from trainer.records.origin import git_commit
from trainer.records.result import Result

FORMAT_VERSION = 1
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")
"""Python packages whose versions the manifest has, as far as they are installed: ONNX Runtime has one of two names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResults:
    """The results of the checks. The manifest has these fields at its top level.

    Args:
        precision: `float32` or `int8`.
        golden_tolerance: largest difference from the golden logits that a server should accept.
        metrics: from `metrics_section`.
        validation: from `Correctness.to_json`.
        parity: from `parity_section`.
    """

    precision: str
    golden_tolerance: float
    metrics: dict[str, Any]
    validation: dict[str, Any]
    parity: dict[str, Any]


def metrics_section(reference: ReferenceModel, correctness: Correctness) -> dict[str, Any]:
    """Returns the validation accuracy of an exported model, and the figures of its run."""
    return {
        **correctness.metrics,
        "test_time_views": reference.views,
        "num_views": NUM_VIEWS[reference.views],
        "run": _run_section(reference.result, reference.run.recipe.test_time_views) if reference.result else None,
    }


def _run_section(result: Result, views: TestTimeViews) -> dict[str, Any]:
    """Returns the figures of a run, which are of one view of each image, and those with the recipe's views."""
    known = ("val_accuracy", "test_accuracy", "test_errors", "num_test", "test_look", "precision", "warnings")
    with_views = ("val_accuracy_with_views", "test_accuracy_with_views", "test_errors_with_views")
    is_averaged = is_headline_averaged(views, result.test_errors_with_views)  # by version 0.1
    section = {name: getattr(result, name) for name in known} | {"test_time_views": views if is_averaged else "one"}
    if result.test_errors_with_views is not None:
        section |= {"views": views} | {name: getattr(result, name) for name in with_views}
    return section


def parity_section(
    reference: ReferenceModel, plan: ParityPlan, results: dict[str, list[ParityResult]], tolerance: float
) -> dict[str, Any]:
    """Returns the plan and the results of the parity check.

    Args:
        results: by file name.
    """
    num_validation = min(reference.parity_images.num_validation, len(reference.logits))
    return {
        "reference": "the trained model, eager, float32, on the CPU",
        "tolerance": tolerance,
        "plan": asdict(plan),
        "num_validation_images": num_validation,
        "num_training_images": len(reference.logits) - num_validation,
        "formats": {name: [asdict(result) for result in found] for name, found in results.items()},
    }


def build_manifest(
    version: int,
    *,
    model: RepositoryModel,
    reference: ReferenceModel,
    files: dict[str, bytes],
    check_results: CheckResults,
    quality: dict[str, Any],
) -> bytes:
    """Returns the content of `manifest.json`.

    Args:
        files: the content of all other files of the version, by name.
        quality: from `QualityCheck.section`.
    """
    classifier = reference.classifier
    document = {
        "format_version": FORMAT_VERSION,
        "name": model.name,
        "version": version,
        "files": {name: _digest(content) for name, content in files.items()},
        "inputs": [_tensor(INPUT, "UINT8", *model.image_shape)],
        "outputs": [_tensor(name, "FP32", len(model.labels)) for name in (LOGITS, PROBABILITIES)],
        PREPROCESSING: Preprocessing(model.preprocessing, model.significant_bits or 16).to_json(),
        "normalization": {
            "inside_the_model": True,
            "mean": classifier.mean.flatten().tolist(),
            "deviation": classifier.deviation.flatten().tolist(),
        },
        "labels": model.labels,
        **asdict(check_results),
        "quality": quality,
        "origin": _origin(reference.run),
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def _digest(content: bytes) -> dict[str, str | int]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _tensor(name: str, datatype: str, *dims: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1, *dims]}


def _origin(run: Run) -> dict[str, Any]:
    return {
        "run": run.folder.path.absolute().name,
        "step": run.state.step,
        "weights_sha256": weights_sha256(run.learner.model),
        "dataset": run.dataset.name,
        "dataset_sha256": run.dataset.sha256,
        "config": run.folder.fingerprint.values,
        "git_commit": git_commit(),
        "libraries": _versions(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    """Returns the versions of the installed libraries, by the names of their packages."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = installed_version(name)
    return found
