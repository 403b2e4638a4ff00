"""The steps of an export: compute the reference, convert, check, publish."""

from functools import partial
from pathlib import Path

from convoy.cpus import num_available_cpus
from trainer.errors import ExportError
from trainer.export.formats import FloatArray, convert, convert_to_onnx, load_predictor
from trainer.export.golden import golden_file
from trainer.export.manifest import Quality, build_manifest, metrics_section, parity_section
from trainer.export.parity import TOLERANCE, ParityResult, check_parity, run_inference, torch_threads
from trainer.export.reference import ReferenceModel, largest_difference
from trainer.export.repository import GOLDEN, MAX_BATCH_SIZE, ONNX, RepositoryModel
from trainer.loop.run import Run
from trainer.records.result import Result

MAX_ACCURACY_LOSS = 0.001
"""Validation accuracy that int8 may lose against float32."""
TOLERANCE_FACTOR = 2.0
"""On other machines, int8 outputs may differ by this many times the largest difference found here."""


def export(run: Run, model: RepositoryModel, result: Result | None) -> Path:
    """Publishes a run's weights as the next version of a model, in ONNX, TorchScript and torch.export.

    Args:
        result: what `result.json` holds or will hold; None if the run has no result yet.

    Returns:
        The version's folder.

    Raises:
        ConfigError: a model with this name exists and has other classes, inputs or outputs.
        ExportError: the outputs of a format differ from the trained model's, or the repository cannot be written.
    """
    model.check()
    run.progress.say(f"exporting {model.name}: ONNX, TorchScript, torch.export")
    with torch_threads(num_available_cpus()):  # the other ranks are idle
        reference = ReferenceModel.from_run(run, result)
        files = convert(*reference.export_module())
        predictors = {name: load_predictor(name, content) for name, content in files.items()}
        results = {
            name: check_parity(name, predict, reference.sample, reference.logits)
            for name, predict in predictors.items()
        }
        run.progress.say(_summary(results))
        logits, _ = run_inference(predictors[ONNX], reference.sample, MAX_BATCH_SIZE, reference.sample.num_validation)
    quality = Quality(
        precision="float32",
        golden_tolerance=TOLERANCE,
        metrics=metrics_section(reference, logits),
        parity=parity_section(reference, results, TOLERANCE),
    )
    return _publish(reference, model, files, quality)


def export_int8(run: Run, model: RepositoryModel, result: Result | None) -> Path:
    """Publishes a run's weights in int8, in ONNX alone, as the next version of a model.

    Args:
        result: what `result.json` holds or will hold; None if the run has no result yet.

    Returns:
        The version's folder.

    Raises:
        ConfigError: a model with this name exists and has other classes, inputs or outputs.
        ExportError: int8 loses more than 0.1 points of validation accuracy, or the repository cannot be written.
    """
    from trainer.export.quantize import CALIBRATION_BATCH_SIZE, NUM_CALIBRATION_IMAGES, quantize

    model.check()
    run.progress.say(f"exporting {model.name}: ONNX in int8, calibrated on training images")
    with torch_threads(num_available_cpus()):
        reference = ReferenceModel.from_run(run, result)
        float32 = convert_to_onnx(*reference.export_module())
        calibration = reference.calibration_images(NUM_CALIBRATION_IMAGES)
        files = {ONNX: quantize(float32, calibration.split(CALIBRATION_BATCH_SIZE))}
        predict = load_predictor(ONNX, files[ONNX])
        logits, _ = run_inference(predict, reference.sample, MAX_BATCH_SIZE, len(reference.sample))
        run.progress.say(_check_accuracy_loss(reference, logits, model.name))
        tolerance = TOLERANCE_FACTOR * largest_difference(logits, reference.logits)
        results = {ONNX: check_parity(ONNX, predict, reference.sample, reference.logits, tolerance)}
        golden, golden_logits = reference.golden
        golden_difference = largest_difference(predict(golden.numpy())[0], golden_logits)
    quality = Quality(
        precision="int8",
        golden_tolerance=max(TOLERANCE, TOLERANCE_FACTOR * golden_difference),
        metrics=metrics_section(reference, logits) | {"float32": metrics_section(reference, reference.logits)},
        parity=parity_section(reference, results, tolerance),
    )
    return _publish(reference, model, files, quality)


def _publish(reference: ReferenceModel, model: RepositoryModel, files: dict[str, bytes], quality: Quality) -> Path:
    """Adds the golden batch and the manifest, and publishes all files as the model's next version."""
    files = files | {GOLDEN: golden_file(*reference.golden)}
    manifest = partial(build_manifest, model=model, reference=reference, files=files, quality=quality)
    version = model.publish(files, manifest)
    reference.run.progress.say(
        f"exported to {version}; serve it: python -m serving --model-repository {model.repository}"
    )
    return version


def _summary(results: dict[str, list[ParityResult]]) -> str:
    found = [result for of_format in results.values() for result in of_format]
    sizes = ", ".join(str(size) for size in sorted({result.batch_size for result in found}))
    return (
        f"every format matches the trained model on {max(result.num_images for result in found):,} images: "
        f"batch sizes {sizes}, largest difference {max(result.largest_difference for result in found):.1e}, "
        f"{sum(result.near_ties for result in found)} near ties"
    )


def _check_accuracy_loss(reference: ReferenceModel, logits: FloatArray, name: str) -> str:
    """Compares int8 with float32 on validation images.

    Returns:
        The comparison, for the terminal.

    Raises:
        ExportError: int8 loses too much.
    """
    num_images = reference.sample.num_validation
    before, after = reference.count_errors(reference.logits), reference.count_errors(logits)
    summary = f"{after:,} of {num_images:,} validation images wrong in int8, {before:,} in float32"
    if after - before > MAX_ACCURACY_LOSS * num_images:
        raise ExportError(f"{name} is not published: {summary}; the limit is {100 * MAX_ACCURACY_LOSS:g} points")
    return summary
