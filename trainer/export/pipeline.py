"""The steps of an export: compute the reference, convert, check parity and quality, publish."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from convoy.cpus import num_available_cpus
from trainer.errors import ExportError, TrainerError, in_one_line
from trainer.evaluation.views import NUM_VIEWS, average_views
from trainer.export.folding import fold
from trainer.export.formats import FloatArray, Predictor, convert, convert_to_onnx, load_predictor
from trainer.export.golden import golden_file
from trainer.export.manifest import CheckResults, build_manifest, metrics_section, parity_section
from trainer.export.parity import (
    QUICK,
    THOROUGH,
    DifferenceError,
    ParityCheck,
    ParityPlan,
    ParityResult,
    reference_logits,
    torch_threads,
)
from trainer.export.parity_images import ParityImages
from trainer.export.plan import ExportOptions
from trainer.export.quality import Correctness, QualityCheck, constant_class
from trainer.export.reference import ReferenceModel, copy_of_model, largest_difference, tolerance_of
from trainer.export.repository import GOLDEN, ONNX, RepositoryModel
from trainer.export.throttle import throttled
from trainer.loop.run import Run
from trainer.models.start import is_foreign
from trainer.recipes import TestTimeViews
from trainer.records.result import Result
from trainer.user_code import is_reference, line_in

MAX_ACCURACY_LOSS = 0.001
"""Validation accuracy that int8 may lose against float32."""
TOLERANCE_FACTOR = 2.0
"""On other machines, int8 outputs may differ by this many times the largest difference found here."""
NUM_REHEARSAL_IMAGES = 4
REHEARSAL_TOLERANCE = 0.01
"""Part of the largest logit. Rounding is relatively larger before a training, and the fault sought is larger still."""
_CAUSES = {
    "Constraints violated": "its code is for one number of images, as with a loop over them",
    "data-dependent": "its code depends on the values of tensors, as with `if` or `item()`",
}
"""What texts in errors of torch's exporters mean."""


def export(run: Run, model: RepositoryModel, result: Result | None, options: ExportOptions) -> Path:
    """Publishes a run's weights as the next version of a model, in ONNX, TorchScript and torch.export.

    Args:
        result: the content of `result.json`; None if the run has no result yet.

    Returns:
        The version's folder.

    Raises:
        ConfigError: a model with this name exists and has other classes, inputs or outputs.
        QualityError: the model is clearly worse than the version that serves, or always predicts the same class.
        ExportError: the outputs of a format differ from the trained model's, or the repository cannot be written.
    """
    model.check()
    run.progress.log(f"exporting {model.name}: ONNX, TorchScript, torch.export{_describe_views(run, options)}")
    plan = THOROUGH if options.thorough else QUICK
    with torch_threads(num_available_cpus()):  # the other ranks are idle
        with _conversion_errors(run):
            reference, check = _reference(run, result, plan, options)
            files = convert(*reference.export_module())
        served, logits = _check_served(check, files[ONNX], reference, options)
        quality = _check_quality(reference, model, logits, options)
        others = {name: check.run(name, _load(run, name, files[name])) for name in files if name != ONNX}
    results = {ONNX: served, **others}
    run.progress.log(_summary(results))
    check_results = CheckResults(
        precision="float32",
        golden_tolerance=reference.tolerance,
        metrics=metrics_section(reference, quality.correctness),
        validation=quality.correctness.to_json(),
        parity=parity_section(reference, plan, results, reference.tolerance),
    )
    return _publish(reference, model, files, check_results, quality)


def export_int8(run: Run, model: RepositoryModel, result: Result | None, options: ExportOptions) -> Path:
    """Publishes a run's weights in int8, in ONNX alone, as the next version of a model.

    Args:
        result: the content of `result.json`; None if the run has no result yet.

    Returns:
        The version's folder.

    Raises:
        ConfigError: a model with this name exists and has other classes, inputs or outputs.
        QualityError: the model is clearly worse than the version that serves, or always predicts the same class.
        ExportError: int8 loses more than 0.1 points of validation accuracy, or the repository cannot be written.
    """
    from trainer.export.quantize import CALIBRATION_BATCH_SIZE, NUM_CALIBRATION_IMAGES, quantize

    if not run.has_validation:
        raise ExportError(
            "int8 is published if it costs at most 0.1 points of validation accuracy, and this run has no validation "
            "images (num_validation 0): export it without --int8"
        )
    model.check()
    run.progress.log(
        f"exporting {model.name}: ONNX in int8, calibrated on training images{_describe_views(run, options)}"
    )
    plan = THOROUGH if options.thorough else QUICK
    plan = replace(plan, reference_s=plan.served_s)  # there is one file to check, and float32's accuracy counts, too
    with torch_threads(num_available_cpus()):
        with _conversion_errors(run):
            reference, check = _reference(run, result, plan, options)
            float32 = convert_to_onnx(*reference.export_module())
        calibration = reference.calibration_images(NUM_CALIBRATION_IMAGES)
        files = {ONNX: quantize(float32, calibration.split(CALIBRATION_BATCH_SIZE))}
        predict = load_predictor(ONNX, files[ONNX])
        outputs = check.compute(ONNX, predict, check.images.largest_batch, len(reference.logits), plan.served_s)
        logits = outputs[0]
        before = _correctness(reference, reference.logits[: len(logits)])
        run.progress.log(_check_accuracy_loss(before, _correctness(reference, logits), model.name))
        quality = _check_quality(reference, model, logits, options)
        difference = largest_difference(logits, reference.logits[: len(logits)])
        tolerance = max(reference.tolerance, TOLERANCE_FACTOR * difference)
        results = {ONNX: replace(check, tolerance=tolerance).run(ONNX, predict, outputs)}
        golden, golden_logits = reference.golden
        golden_difference = largest_difference(predict(golden.numpy())[0], golden_logits)
    check_results = CheckResults(
        precision="int8",
        golden_tolerance=max(reference.tolerance, TOLERANCE_FACTOR * golden_difference),
        metrics=metrics_section(reference, quality.correctness) | {"float32": metrics_section(reference, before)},
        validation=quality.correctness.to_json(),
        parity=parity_section(reference, plan, results, tolerance),
    )
    return _publish(reference, model, files, check_results, quality)


def rehearse(run: Run, options: ExportOptions) -> None:
    """Exports a network before its training, without publishing it, so that one that cannot be exported fails at once.

    Raises:
        ExportError: a format cannot be made, or its outputs differ from the network's.
    """
    network, views, train = run.recipe.network, _views(run, options), run.dataset.train
    run.progress.log(f"trying the export of {network}")
    few = run.train_indices[:NUM_REHEARSAL_IMAGES]
    images = ParityImages((train, few[:0]), (train, few), len(few))
    with torch_threads(num_available_cpus()), torch.random.fork_rng(devices=[]):
        with _conversion_errors(run):
            classifier = copy_of_model(run)
            predict = partial(average_views, classifier, views=views)
            logits = reference_logits(predict, images.batches(len(few), len(few)))
            if not np.isfinite(logits).all():
                return  # the training says so
            files = convert(fold(classifier, views), torch.zeros(2, *train.shape, dtype=torch.uint8))
            predictors = {name: load_predictor(name, content) for name, content in files.items()}
        tolerance = max(tolerance_of(logits), REHEARSAL_TOLERANCE * float(np.abs(logits).max()))
        check = ParityCheck(images=images, reference=logits, plan=QUICK, log=lambda _line: None, tolerance=tolerance)
        try:
            for name, predictor in predictors.items():
                check.run(name, predictor)
        except DifferenceError as error:
            raise ExportError(
                f"{network} cannot be exported: {error}. In evaluation, the logits of an image must depend on nothing "
                "else: no random numbers, earlier calls or other images of the batch"
            ) from error


@contextmanager
def _conversion_errors(run: Run) -> Iterator[None]:
    """Context of a conversion: where the network is not Convoy's, an error becomes one line.

    Raises:
        ExportError: a format cannot be made or loaded.
    """
    network = run.recipe.network
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:  # torch's exporters raise errors of many kinds
        if not is_foreign(network):
            raise
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        text = in_one_line(root)
        cause = next((known for part, known in _CAUSES.items() if part in text), text.partition(". ")[0][:200])
        line = line_in(network, error) if is_reference(network) else None
        raise ExportError(f"{network} cannot be exported: {f'{line}: ' if line else ''}{cause}") from error


def _load(run: Run, name: str, content: bytes) -> Predictor:
    with _conversion_errors(run):
        return load_predictor(name, content)


def _views(run: Run, options: ExportOptions) -> TestTimeViews:
    return run.recipe.test_time_views if options.export_views else "one"


def _describe_views(run: Run, options: ExportOptions) -> str:
    """Returns text about the views that the exported model averages, or "" without `--export-views`."""
    if not options.export_views:
        return ""
    views = run.recipe.test_time_views
    if views == "one":
        return f"; recipe {run.recipe.name} has no test-time views to export"
    return f"; each output is the mean of {NUM_VIEWS[views]} views ({views}), which takes that many times as long"


def _reference(
    run: Run, result: Result | None, plan: ParityPlan, options: ExportOptions
) -> tuple[ReferenceModel, ParityCheck]:
    """Computes the outputs of the trained model; returns it, and the check that compares files with it."""
    log = throttled(run.progress.log)
    reference = ReferenceModel.from_run(run, result, plan, _views(run, options), log)
    images, logits = reference.parity_images, reference.logits
    return reference, ParityCheck(images=images, reference=logits, plan=plan, log=log, tolerance=reference.tolerance)


def _check_served(
    check: ParityCheck, content: bytes, reference: ReferenceModel, options: ExportOptions
) -> tuple[list[ParityResult], FloatArray]:
    """Checks the ONNX file, and returns its logits for as many parity images as there is time for.

    On a GPU the trained model, which the file equals, computes the logits for all parity images.
    """
    plan, predict = check.plan, _load(reference.run, ONNX, content)
    on_gpu = reference.logits_on_gpu(options.device) if options.device.type == "cuda" else None
    if on_gpu is not None:
        return check.run(ONNX, predict), on_gpu
    outputs = check.compute(ONNX, predict, check.images.largest_batch, len(reference.parity_images), plan.served_s)
    return check.run(ONNX, predict, outputs), outputs[0]


def _correctness(reference: ReferenceModel, logits: FloatArray) -> Correctness:
    """Returns which validation images the logits classify correctly.

    Args:
        logits: for the first parity images, `[N, classes]`.
    """
    images = reference.parity_images
    num_images = min(len(logits), images.num_validation)
    right = logits[:num_images].argmax(axis=1) == images.labels[:num_images]
    return Correctness.of(right, images.validation_sha256, images.num_validation)


def _check_quality(
    reference: ReferenceModel, model: RepositoryModel, logits: FloatArray, options: ExportOptions
) -> QualityCheck:
    """Compares the exported model with the version that it would replace, and tells the user.

    Args:
        logits: for the first parity images, `[N, classes]`.

    Raises:
        QualityError: the model must not be published, unless `--promote` says so.
    """
    correctness, labels = _correctness(reference, logits), reference.parity_images.labels
    constant = constant_class(logits.argmax(axis=1), labels[: len(logits)], correctness.num_images)
    constant_label = None if constant is None else model.labels[constant]
    log = reference.run.progress.log
    return QualityCheck(model, correctness, constant_label, promote=options.promote, log=log)


def _publish(
    reference: ReferenceModel,
    model: RepositoryModel,
    files: dict[str, bytes],
    check_results: CheckResults,
    quality: QualityCheck,
) -> Path:
    """Adds the golden batch and the manifest, and publishes all files as the model's next version.

    Raises:
        QualityError: a version that was published meanwhile is clearly better.
    """
    files = files | {GOLDEN: golden_file(*reference.golden)}

    def manifest(number: int) -> bytes:
        return build_manifest(
            number,
            model=model,
            reference=reference,
            files=files,
            check_results=check_results,
            quality=quality.section(),  # other runs may have published since it was checked
        )

    version = model.publish(files, manifest)
    reference.run.progress.log(f"exported to {version}; serve it: convoy serve --model-repository {model.repository}")
    if (pinned := model.pinned()) is not None:
        unpin = f"convoy models unpin {model.name}"
        reference.run.progress.log(f"version {pinned} is pinned and keeps serving until {unpin}")
    return version


def _summary(results: dict[str, list[ParityResult]]) -> str:
    found = [result for of_format in results.values() for result in of_format]
    sizes = ", ".join(str(size) for size in sorted({result.batch_size for result in found}))
    return (
        f"every format matches the trained model on {max(result.num_images for result in found):,} images: "
        f"batch sizes {sizes}, largest difference {max(result.largest_difference for result in found):.1e}, "
        f"{sum(result.near_ties for result in found)} near ties"
    )


def _check_accuracy_loss(float32: Correctness, int8: Correctness, name: str) -> str:
    """Compares int8 with float32 on validation images.

    Returns:
        The comparison, for the terminal.

    Raises:
        ExportError: int8 loses too much.
    """
    before, after = (correctness.num_images - correctness.num_right for correctness in (float32, int8))
    summary = f"{after:,} of {int8.num_images:,} validation images wrong in int8, {before:,} in float32"
    if after - before > MAX_ACCURACY_LOSS * int8.num_images:
        raise ExportError(f"{name} is not published: {summary}; the limit is {100 * MAX_ACCURACY_LOSS:g} points")
    return summary
