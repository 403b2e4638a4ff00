"""An export, as a table of contents: prepare -> convert -> check -> publish."""

from pathlib import Path
from typing import Any

from convoy.cpus import num_available_cpus
from trainer.errors import ExportError
from trainer.export.formats import Floats, convert, convert_to_onnx, open_format
from trainer.export.parity import LARGEST_BATCH, TOLERANCE, ParityResult, ask, check_parity, torch_threads
from trainer.export.repository import ONNX, Model
from trainer.export.trained import Trained, largest_difference
from trainer.loop.fit import Run

LARGEST_LOSS = 0.001
"""Of accuracy on validation images, by which int8 may be worse than float32."""
MARGIN = 2.0
"""Elsewhere, int8 answers may differ by this many times the largest difference found here."""


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
    with torch_threads(num_available_cpus()):  # the other ranks are at rest
        trained = Trained.prepare(run, result)
        files = convert(*trained.served())
        formats = {name: open_format(name, content) for name, content in files.items()}
        agreements = {
            name: check_parity(name, answer, trained.sample, trained.logits) for name, answer in formats.items()
        }
        run.progress.say(_summary(agreements))
        logits, _ = ask(formats[ONNX], trained.sample, LARGEST_BATCH, trained.sample.num_validation)
    findings = {
        "precision": "float32",
        "golden_tolerance": TOLERANCE,
        "metrics": trained.metrics(logits),
        "parity": trained.parity(agreements, TOLERANCE),
    }
    return trained.publish(model, files, findings)


def export_int8(run: Run, model: Model, result: dict[str, Any] | None) -> Path:
    """Publish a run's weights in int8, in ONNX alone, as the next version of a model, if little accuracy is lost.

    Raises:
        ConfigError: as `export`.
        ExportError: more than 0.1 points would be lost, or the repository cannot be written.
    """
    from trainer.export.quantize import BATCH_SIZE, NUM_IMAGES, quantize

    model.check()
    run.progress.say(f"exporting {model.name}: ONNX in int8, calibrated on training images")
    with torch_threads(num_available_cpus()):
        trained = Trained.prepare(run, result)
        float32 = convert_to_onnx(*trained.served())
        files = {ONNX: quantize(float32, trained.training_images(NUM_IMAGES).split(BATCH_SIZE))}
        answer = open_format(ONNX, files[ONNX])
        logits, _ = ask(answer, trained.sample, LARGEST_BATCH, len(trained.sample))
        run.progress.say(_check_loss(trained, logits, model.name))
        tolerance = MARGIN * largest_difference(logits, trained.logits)
        agreements = {ONNX: check_parity(ONNX, answer, trained.sample, trained.logits, tolerance)}
        golden, golden_logits = trained.golden
        golden_difference = largest_difference(answer(golden.numpy())[0], golden_logits)
    findings = {
        "precision": "int8",
        "golden_tolerance": max(TOLERANCE, MARGIN * golden_difference),
        "metrics": trained.metrics(logits) | {"float32": trained.metrics(trained.logits)},
        "parity": trained.parity(agreements, tolerance),
    }
    return trained.publish(model, files, findings)


def _summary(agreements: dict[str, list[ParityResult]]) -> str:
    found = [agreement for of_format in agreements.values() for agreement in of_format]
    sizes = ", ".join(str(size) for size in sorted({agreement.batch_size for agreement in found}))
    return (
        f"all formats answer {max(agreement.num_images for agreement in found):,} images as the trained model does: "
        f"batches of {sizes}, largest difference {max(agreement.largest_difference for agreement in found):.1e}, "
        f"{sum(agreement.near_ties for agreement in found)} near ties"
    )


def _check_loss(trained: Trained, logits: Floats, name: str) -> str:
    """Whether int8 is good enough; says how good."""
    num_images = trained.sample.num_validation
    before, after = trained.num_errors(trained.logits), trained.num_errors(logits)
    said = f"{after:,} of {num_images:,} validation images wrong in int8, {before:,} in float32"
    if after - before > LARGEST_LOSS * num_images:
        raise ExportError(f"{name} is not published: {said}; at most {100 * LARGEST_LOSS:g} points may be lost")
    return said
