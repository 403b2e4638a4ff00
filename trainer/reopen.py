"""A run opened again: its newest weights, evaluated or exported."""

from dataclasses import replace

from trainer.config import EvaluateConfig, ExportConfig
from trainer.data import Dataset, without_test_images
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.intervals import describe_accuracy
from trainer.evaluation.ledger import Ledger
from trainer.evaluation.views import NUM_VIEWS
from trainer.export.plan import repository_model
from trainer.hardware import keep_freed_memory
from trainer.loop.run import Run, restore
from trainer.models import num_parameters
from trainer.paths import image_folder
from trainer.prepare import load
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.records.checkpoint import weights_sha256
from trainer.records.run_folder import RunFolder
from trainer.train import evaluate_on_test_set, setup


def evaluate_run(config: EvaluateConfig) -> None:
    """Evaluates a run; under torchrun every number of ranks gives the same figures.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    keep_freed_memory()
    with World.join(config.device) as world, Progress(is_main=world.is_main) as progress:
        run, dataset = open_run(config, world, progress)
        ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}"
        progress.say(f"{describe(run)}; {run.learner.precision}, {ranks}")
        num_views = NUM_VIEWS[run.recipe.test_time_views]
        if config.split == "validation":
            validation = evaluate(run.learner.predict, run.validation_images, run.validation_indices, world)
            accuracy = describe_accuracy(validation.num_errors, validation.num_images, num_views=num_views)
            progress.say(f"validation accuracy {accuracy}")
            return
        recorded = Ledger(run.folder.ledger_path).find(run.dataset.sha256, weights_sha256(run.learner.model))
        if recorded is None:
            _, _, recorded = evaluate_on_test_set(run, dataset)
        if recorded is not None:  # on the main rank
            accuracy = recorded.describe(run.folder.ledger_path, num_views=num_views)
            progress.say(f"test accuracy {accuracy}{', recorded earlier' if recorded.is_repeated else ''}")


def export_run(config: ExportConfig) -> None:
    """Exports a run on the CPU; under torchrun only the main rank does.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    from trainer.export.pipeline import export, export_int8  # imports onnx, which takes a second

    keep_freed_memory()
    with World.join("cpu") as world, Progress(is_main=world.is_main) as progress:
        run, _ = open_run(config, world, progress)
        if world.is_main:
            progress.say(describe(run))
            name = config.name or run.recipe.name + ("-int8" if config.int8 else "")
            publish = export_int8 if config.int8 else export
            publish(run, repository_model(run, config.model_repository, name), run.folder.result())


def open_run(config: EvaluateConfig | ExportConfig, world: World, progress: Progress) -> tuple[Run, Dataset]:
    """Opens a run at its newest good checkpoint.

    Returns:
        The run, and its data set with the test images.

    Raises:
        ConfigError: there is no run or no checkpoint, or its data set has changed.
        CheckpointError: the checkpoint with the run's final weights is damaged or gone.
    """
    folder = RunFolder.read(config.run)
    recipe = folder.fingerprint.recipe
    recipe = replace(recipe, dataset=config.dataset or recipe.dataset)
    root = image_folder(recipe.dataset)
    if root is not None and not root.exists():
        raise ConfigError(f"{root} does not exist: name the place of the run's images with --dataset folder:PATH")
    dataset = load(recipe, folder.fingerprint.image_size, config.data_dir, world, progress.say)
    if dataset.sha256 != folder.fingerprint.dataset_sha256:
        raise ConfigError(
            f"{dataset.name} is not what {folder.path} was trained on: its images, or its division into training and "
            "test images, have changed since"
        )
    run = setup(recipe, without_test_images(dataset), folder, world, progress)
    if not restore(run):
        raise ConfigError(f"{folder.path} has no good checkpoint: train it first, with --run-dir {folder.path}")
    result = folder.result()
    if result is not None and result.weights_sha256 != weights_sha256(run.learner.model):
        raise CheckpointError(
            f"{folder.path} ended with other weights than those of step {run.position.step}: its last checkpoint is "
            "damaged or gone; restore it, or train anew in another folder"
        )
    return run, dataset


def describe(run: Run) -> str:
    """Returns which weights of which run are evaluated or exported, for the user."""
    return (
        f"{run.folder.path} at step {run.position.step} of {run.num_steps}: {run.recipe.name} on {run.dataset.name}, "
        f"{num_parameters(run.learner.model):,} parameters"
    )
