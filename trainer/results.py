"""The results of a run: evaluates the trained network, and writes `result.json` and the report."""

from trainer.collector import paused_collector
from trainer.data import Dataset, Images
from trainer.errors import writing
from trainer.evaluation.entry import EvaluatedWeights, LedgerEntry
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import simultaneous_interval
from trainer.evaluation.ledger import Ledger, RecordedEvaluation, evaluate_and_record
from trainer.evaluation.recall import balanced_accuracy
from trainer.evaluation.views import is_headline_averaged
from trainer.hardware import describe
from trainer.loop.run import Run
from trainer.loop.shown_mistakes import mistakes_in_validation
from trainer.models import num_parameters
from trainer.network_files import without_paths
from trainer.records.checkpoint import weights_sha256
from trainer.records.metrics import read_metrics
from trainer.records.result import Result
from trainer.sinks import Sinks

NUM_SHOWN_MISTAKES = 16
"""In TensorBoard and services."""


def validate(run: Run) -> Evaluation | None:
    """Evaluates on the validation images, with the recipe's test-time views, too; None if there are no such images.

    All ranks call this.
    """
    if not run.has_validation:
        return None
    return run.learner.evaluate(run.validation_images, run.validation_indices, run.world)


def evaluate_on_test_set(run: Run, dataset: Dataset) -> tuple[Images, Evaluation, RecordedEvaluation | None]:
    """Evaluates on the test images and records it in the ledger. All ranks call this.

    Args:
        dataset: the run's data set with its test images, which no run holds while it trains.

    Returns:
        The test images, their evaluation and, on the main rank, its place in the ledger.
    """
    fingerprint = run.folder.fingerprint
    weights = EvaluatedWeights(
        recipe=run.recipe.name,
        run=run.folder.path.name,
        seed=run.seed,
        weights_sha256=weights_sha256(run.learner.model),
        config_sha256=fingerprint.sha256,
        setting_sha256=fingerprint.setting_sha256,
    )
    return evaluate_and_record(
        Ledger(run.folder.ledger_path),
        dataset,
        weights,
        lambda images: run.learner.evaluate(images, None, run.world),
        is_main=run.world.is_main,
    )


def show_results(run: Run, validation: Evaluation | None, recorded: RecordedEvaluation, sinks: Sinks) -> None:
    """Passes the accuracies of the trained network, and images of its mistakes in validation, to the sinks."""
    figures = {} if validation is None else {"val_accuracy": validation.accuracy}
    figures["test_accuracy"] = recorded.entry.accuracy
    sinks.write("result", step=run.state.step, epoch=run.num_epochs_done, **figures)
    if validation is None:
        return
    mistakes = mistakes_in_validation(run, validation, NUM_SHOWN_MISTAKES)
    if mistakes:
        sinks.show_mistakes(mistakes, step=run.state.step)


def summarize(run: Run, validation: Evaluation | None, test: Evaluation, recorded: RecordedEvaluation) -> Result:
    """Returns the content of `result.json`, before an export."""
    ledger, entry = Ledger(run.folder.ledger_path), recorded.entry
    recall_by_class = test.recall_by_class(run.dataset.classes)
    warnings = [] if validation is None else run.baseline.check(_last_train_loss(run), validation)
    of_setting = ledger.of_setting(run.folder.fingerprint.setting_sha256)
    views = run.recipe.test_time_views
    num_averaged = sum(is_headline_averaged(views, each.num_errors_with_views) for each in of_setting)
    return Result(
        recipe=run.recipe.name,
        dataset=run.dataset.name,
        dataset_sha256=run.dataset.sha256,
        dataset_notes=run.dataset.notes,
        test_sha256=entry.test_sha256 or entry.dataset_sha256,  # an old entry has no digest of the images
        model=without_paths(run.recipe).network,
        num_parameters=num_parameters(run.learner.model),
        world_size=run.world.size,
        virtual_shards=run.world.virtual_shards,
        device=run.world.device.type,
        precision=run.learner.precision,
        seed=run.seed,
        epochs=run.num_epochs_done,
        best_epoch=run.state.best.epoch if run.state.best is not None else None,
        steps=run.state.step,
        global_batch_size=run.recipe.global_batch_size,
        train_seconds=run.state.seconds,
        images_per_second=run.num_epochs_done * len(run.train_indices) / run.state.seconds,
        num_validation=len(run.validation_indices),
        val_accuracy=None if validation is None else validation.accuracy,
        val_accuracy_with_views=None if validation is None else validation.accuracy_with_views,
        test_accuracy=entry.accuracy,
        test_accuracy_with_views=test.accuracy_with_views,
        test_errors=entry.num_errors,
        test_errors_with_views=test.num_errors_with_views,
        num_test=entry.num_images,
        test_interval=simultaneous_interval(entry.num_images - entry.num_errors, entry.num_images, recorded.number),
        balanced_accuracy=balanced_accuracy(recall_by_class),
        recall_by_class=recall_by_class,
        warnings=tuple(warning.text for warning in warnings),
        test_look=recorded.number,
        num_test_looks=recorded.num_evaluations,
        test_accuracy_of_seeds=_by_seed(of_setting),
        num_averaged_seeds=num_averaged or None,
        looks_by_dataset=ledger.counts_by_dataset(),
        weights_sha256=weights_sha256(run.learner.model),
        exported=None,
        machine=describe(run.world.device),
    )


def _last_train_loss(run: Run) -> float | None:
    """Returns the mean training loss of the last epoch, or None where it could not be written or was not logged."""
    lines = [line for line in read_metrics(run.folder.path) if line["kind"] == "epoch"]
    return lines[-1]["train_loss"] if lines and lines[-1]["step"] == run.state.step else None


def _by_seed(entries: list[LedgerEntry]) -> dict[int, list[float]]:
    """Returns each seed's test accuracies, one for each of its weights that were evaluated."""
    found: dict[int, list[float]] = {}
    for entry in entries:
        if entry.seed is not None:
            found.setdefault(entry.seed, []).append(entry.accuracy)
    return found


def import_for_report() -> None:
    """Imports what the metrics and the report need, which takes a second."""
    with paused_collector():
        import tensorboard.summary.writer.record_writer  # noqa: F401

        import trainer.report.page  # noqa: F401


def report(run: Run, result: Result, test_images: Images, test: Evaluation, recorded: RecordedEvaluation) -> None:
    """Writes `report.html` and then `result.json`, which completes the run, and tells the user.

    Raises:
        CheckpointError: they cannot be written.
    """
    with paused_collector():
        from trainer.report.page import write_report  # imports matplotlib, which takes a second

    with writing(run.folder.path):
        run.folder.write_config(run.world)
        write_report(run.folder.path, result, run.dataset.classes, test_images, test)
        result.write(run.folder.result_path)
    accuracy = recorded.describe(
        run.folder.ledger_path, views=run.recipe.test_time_views, recall_by_class=result.recall_by_class or {}
    )
    run.progress.log(f"test accuracy {accuracy}")
    run.progress.log(f"report: {run.folder.report_path}")
