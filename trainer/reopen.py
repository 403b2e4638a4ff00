"""Opens a run again and evaluates or exports its newest weights."""

import os
import sys
from dataclasses import replace

from convoy.allocator import keep_freed_memory
from trainer.config import EvaluateConfig, ExportConfig
from trainer.data import Dataset, without_test_images
from trainer.data.folder.options import FolderOptions
from trainer.errors import ConfigError, reading
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.intervals import describe_accuracy
from trainer.evaluation.ledger import Ledger
from trainer.evaluation.recall import describe_balance
from trainer.evaluation.views import describe_with_views
from trainer.export.plan import ExportOptions, repository_model
from trainer.loop.run import Run, restore_final_weights
from trainer.models import num_parameters
from trainer.network_files import find_network
from trainer.paths import image_folder
from trainer.prepare import load
from trainer.progress import Progress
from trainer.ranks.device import choose_device
from trainer.ranks.environment import RankEnvironment
from trainer.ranks.world import World
from trainer.records.checkpoint import weights_sha256
from trainer.records.run_folder import RunFolder
from trainer.results import evaluate_on_test_set, validate
from trainer.signals import StopRequest
from trainer.train import setup


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a run; under torchrun every number of ranks gives the same figures.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    keep_freed_memory()
    with (
        World.join(config.device, allow_shared_gpu=config.allow_shared_gpu) as world,
        Progress(is_main=world.is_main) as progress,
    ):
        run, dataset = open_run(config, world, progress)
        ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}"
        progress.log(f"{describe(run)}; {run.learner.precision}, {ranks}")
        if config.split == "validation":
            validation = validate(run)
            if validation is None:
                raise ConfigError(
                    f"{config.run} was trained on all training images (num_validation 0), and has no validation "
                    "images: give --split test"
                )
            progress.log(f"validation accuracy {describe_evaluation(run, validation)}")
            return
        ledger, views = Ledger(run.folder.ledger_path), run.recipe.test_time_views
        recorded = ledger.find(run.dataset.sha256, weights_sha256(run.learner.model), views)
        result = run.folder.result()
        recall_by_class = (result.recall_by_class if result is not None else None) or {}
        if recorded is None:
            _, test, recorded = evaluate_on_test_set(run, dataset)
            recall_by_class = test.recall_by_class(run.dataset.classes)
        if recorded is not None:  # on the main rank
            accuracy = recorded.describe(ledger.path, views=views, recall_by_class=recall_by_class)
            progress.log(f"test accuracy {accuracy}{', recorded earlier' if recorded.is_repeated else ''}")
            counted = (result.num_test_looks if result is not None else None) or 0
            entry = recorded.entry
            if missing := ledger.describe_missing(entry.dataset_sha256, entry.test_sha256, run.folder.path, counted):
                progress.log(f"warning: {missing}")


def export_run(config: ExportConfig) -> None:
    """Exports a run; under torchrun only the main rank does. A GPU computes the validation accuracy alone.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    from trainer.export.pipeline import export, export_int8  # imports onnx, which takes a second

    keep_freed_memory()
    device = choose_device(config.device, RankEnvironment())
    # A signal ends the export as Ctrl-C does, so that the repository keeps no unfinished files.
    with StopRequest(), World.join("cpu") as world, Progress(is_main=world.is_main) as progress:
        run, _ = open_run(config, world, progress)
        if world.is_main:
            progress.log(describe(run))
            name = config.name or run.folder.model_name + ("-int8" if config.int8 else "")
            publish = export_int8 if config.int8 else export
            model, options = repository_model(run, config.model_repository, name), ExportOptions.of(config, device)
            publish(run, model, run.folder.result(), options)


def open_run(config: EvaluateConfig | ExportConfig, world: World, progress: Progress) -> tuple[Run, Dataset]:
    """Opens a run at its newest good checkpoint.

    Returns:
        The run, and its data set with the test images.

    Raises:
        ConfigError: there is no run or no checkpoint, or its data set has changed.
        CheckpointError: the run is of a later version, or the checkpoint with its final weights is damaged or gone.
    """
    folder = RunFolder.read(config.run)
    with reading(folder.config_path):
        recipe = folder.fingerprint.recipe
    recipe = find_network(replace(recipe, dataset=config.dataset or recipe.dataset), folder.path)
    root = image_folder(recipe.dataset)
    if root is not None and not os.path.exists(root):
        raise ConfigError(f"{root} does not exist: name the place of the run's images with --dataset folder:PATH")
    options = FolderOptions(
        image_size=folder.fingerprint.image_size,
        source=folder.fingerprint.source,
        skip_bad_images=sys.maxsize,  # the digest tells whether the same files are left out
    )
    dataset = load(recipe, options, config.data_dir, world, progress.log)
    if dataset.sha256 != folder.fingerprint.dataset_sha256:
        raise ConfigError(
            f"{dataset.name} is not what {folder.path} was trained on: its images, or its division into training and "
            "test images, have changed since"
        )
    run = setup(recipe, without_test_images(dataset), folder, world, progress, will_train=False)
    if not restore_final_weights(run):
        raise ConfigError(f"{folder.path} has no good checkpoint: train it first, with --run-dir {folder.path}")
    return run, dataset


def describe_evaluation(run: Run, evaluation: Evaluation) -> str:
    """Returns the figures of an evaluation that no ledger records, for the user."""
    num_images = evaluation.num_images
    return (
        describe_accuracy(evaluation.num_errors, num_images)
        + describe_with_views(evaluation.num_errors_with_views, num_images, run.recipe.test_time_views)
        + describe_balance(evaluation.accuracy, evaluation.recall_by_class(run.dataset.classes))
    )


def describe(run: Run) -> str:
    """Returns which weights of which run are evaluated or exported, for the user."""
    return (
        f"{run.folder.path} at step {run.state.step} of {run.num_steps}: {run.recipe.name} on {run.dataset.name}, "
        f"{num_parameters(run.learner.model):,} parameters"
    )
