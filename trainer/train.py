"""A training run, from a command line to a report. `train` is the table of contents.

    setup -> restore -> fit -> evaluate -> export -> report

What a step computes is in step, what a rank is in distributed, where images come from in data.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data import Dataset, ImageSet, load_dataset, split_validation, without_test_images
from trainer.data.augment import check_shift
from trainer.errors import ConfigError, MismatchError, writing
from trainer.evaluation.evaluate import Evaluation, evaluate
from trainer.evaluation.intervals import simultaneous_interval
from trainer.evaluation.ledger import Ledger, RecordedEvaluation, evaluate_and_record
from trainer.evaluation.views import NUM_VIEWS
from trainer.export.plan import export_trained, plan_export
from trainer.files import write_json
from trainer.hardware import describe, keep_freed_memory
from trainer.loop.fit import fit
from trainer.loop.learner import build_learner
from trainer.loop.run import Position, Run, restore
from trainer.loop.saving import SaveEvery
from trainer.models import num_parameters
from trainer.progress import Progress
from trainer.ranks.consistency import check_same, code_sha256, processor
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.checkpoint import Checkpoints, weights_sha256
from trainer.records.run_folder import RunFolder, in_use
from trainer.signals import StopRequest

SPLIT_SEED = 0
"""Fixed, so that runs with different seeds are validated on the same images."""


def train(config: TrainConfig) -> None:
    """Do what the command line asks for; all that it leaves behind is in the run folder.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    keep_freed_memory()
    with (
        StopRequest() as stop,
        World.join(config.device, config.virtual_shards) as world,
        Progress(is_main=world.is_main, stop=stop) as progress,
        ExitStack() as kept,
    ):
        recipe = config.resolve().as_computed_on(world.device)
        dataset = load(recipe, config.image_size, config.data_dir, world, progress.say)
        folder = RunFolder.plan(config, recipe, dataset, world)
        identities = world.all_gather_object(identity(config, recipe, dataset, world))
        try:
            check_same(identities)
        except MismatchError:
            world.failure_context.folder = folder.make_for_failure()  # else a mistake leaves no folder
            raise
        folder.check(config.resume, world)
        if world.is_main:
            with writing(folder.ledger_path):
                Ledger(folder.ledger_path).all_entries()  # a damaged one is told now, and not when all is trained
        if tell_complete(folder, world, progress.say):
            return
        run = setup(recipe, without_test_images(dataset), folder, world, progress)
        model = plan_export(run, config)
        kept.enter_context(in_use(folder.path, world, progress.say))
        folder.enter(config.resume, world)
        world.failure_context.folder = folder.path
        if tell_complete(folder, world, progress.say):  # who was in it has trained it to its end
            return
        restore(run)
        fit(run, stop, SaveEvery(seconds=config.save_every_s, steps=config.save_every_steps))
        validation = evaluate(run.learner.predict, run.validation_images, run.validation_indices, world)
        test_images, test, recorded = evaluate_on_test_set(run, dataset)
        if recorded is not None:  # on the main rank
            result = summarize(run, validation, recorded)
            try:
                if model is not None:
                    result["exported"] = export_trained(run, model, result)
            except Exception:  # whatever became of the export, the run is complete
                report(run, result, test_images, test, recorded)
                raise
            report(run, result, test_images, test, recorded)
        world.wait_for_ranks([0], "the end")


def identity(config: TrainConfig, recipe: Recipe, dataset: Dataset, world: World) -> dict[str, str]:
    """What this rank runs, for comparison with the others."""
    options = ("recipe", "dataset", "image_size", "seed", "epochs", "global_batch_size", "lr_scale", "precision")
    known = {f"--{name.replace('_', '-')}": str(getattr(config, name)) for name in (*options, "virtual_shards")}
    known |= {"the code of the trainer": code_sha256(), "the version of torch": str(torch.__version__)}
    known |= {"the data set": dataset.sha256, "--precision, as the hardware has it,": recipe.precision}
    return known | ({"the processor": processor(world.device)} if config.virtual_shards else {})


def load(recipe: Recipe, image_size: int | None, data_dir: Path, world: World, say: Callable[[str], None]) -> Dataset:
    """The data set, fetched and verified by one process per host before the others map it."""
    if world.size > recipe.global_batch_size:
        raise ConfigError(
            f"{world.size} ranks for a global batch of {recipe.global_batch_size}: "
            f"use at most {recipe.global_batch_size} ranks, or a larger --global-batch-size"
        )
    prepares = world.local_rank == 0
    if not prepares:
        world.wait_for_ranks(range(world.size), "data")
    dataset = load_dataset(recipe.dataset, data_dir, image_size=image_size, say=say, verify=prepares)
    if prepares:  # other hosts' ranks may be at it for longer than a collective waits
        world.wait_for_ranks(range(world.size), "data")
    return dataset


def tell_complete(folder: RunFolder, world: World, say: Callable[[str], None]) -> bool:
    """Whether there is nothing to do; the user is told so."""
    is_complete = folder.is_complete(world)
    if is_complete:
        report = f" Its report: {folder.report_path}" if folder.report_path.exists() else ""  # a study has its own
        say(f"{folder.path} is complete; nothing to do.{report}")
    return is_complete


def setup(recipe: Recipe, dataset: Dataset, folder: RunFolder, world: World, progress: Progress) -> Run:
    """Split the training images and build what learns.

    Raises:
        ConfigError: the recipe is not for images of this size.
    """
    check_shift(recipe.augment, dataset.train.images.size(2))
    train_indices = torch.arange(len(dataset.train))
    if dataset.validation is not None:
        validation_images, validation_indices = dataset.validation, torch.arange(len(dataset.validation))
    else:
        num_validation = min(recipe.num_validation, max(1, len(dataset.train) // 10))
        train_indices, validation_indices = split_validation(dataset.train, num_validation, SPLIT_SEED)
        validation_images = dataset.train
    learner = build_learner(recipe, dataset, train_indices, folder.fingerprint.seed, world, progress.say)
    progress.say(
        f"{recipe.name} on {dataset.name}: {len(dataset.classes):,} classes; {len(train_indices):,} training, "
        f"{len(validation_indices):,} validation and {dataset.num_test:,} test images; "
        f"{num_parameters(learner.model):,} parameters, {learner.precision}"
    )
    progress.say(
        f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}, {world.num_threads} "
        f"thread{'s' if world.num_threads > 1 else ''} each; {recipe.global_batch_size} images a step; "
        f"run folder {folder.path}"
    )
    if world.num_computing < world.size:
        progress.say(
            f"{world.size} ranks do not divide {world.virtual_shards} virtual shards: {world.num_computing} compute, "
            f"{world.size - world.num_computing} keep up"
        )
    return Run(
        recipe=recipe,
        seed=folder.fingerprint.seed,
        dataset=dataset,
        train_indices=train_indices,
        validation_images=validation_images,
        validation_indices=validation_indices,
        learner=learner,
        folder=folder,
        checkpoints=Checkpoints(folder.path / "checkpoints", progress.say),
        world=world,
        progress=progress,
        position=Position(totals=torch.zeros(2, dtype=torch.float64, device=world.device)),
    )


def evaluate_on_test_set(run: Run, dataset: Dataset) -> tuple[ImageSet, Evaluation, RecordedEvaluation | None]:
    """Evaluates on the test set, once, and records it in the ledger.

    Args:
        dataset: the run's with its test images, which no run holds while it trains.
    """
    marks: dict[str, str | int] = {
        "recipe": run.recipe.name,
        "run": run.folder.path.name,
        "seed": run.seed,
        "weights_sha256": weights_sha256(run.learner.model),
        "config_sha256": run.folder.fingerprint.sha256,
        "setting_sha256": run.folder.fingerprint.setting_sha256,
    }
    return evaluate_and_record(
        Ledger(run.folder.ledger_path),
        dataset,
        marks,
        lambda images: evaluate(run.learner.predict, images, None, run.world),
        is_main=run.world.is_main,
    )


def summarize(run: Run, validation: Evaluation, recorded: RecordedEvaluation) -> dict[str, Any]:
    """What `result.json` will hold."""
    ledger = Ledger(run.folder.ledger_path)
    num_right = recorded.num_images - recorded.num_errors
    return {
        "recipe": run.recipe.name,
        "dataset": run.dataset.name,
        "dataset_sha256": run.dataset.sha256,
        "dataset_notes": run.dataset.notes,
        "test_sha256": recorded.test_sha256,
        "model": run.recipe.network,
        "num_parameters": num_parameters(run.learner.model),
        "world_size": run.world.size,
        "virtual_shards": run.world.virtual_shards,
        "device": run.world.device.type,
        "precision": run.learner.precision,
        "seed": run.seed,
        "epochs": run.recipe.epochs,
        "steps": run.num_steps,
        "global_batch_size": run.recipe.global_batch_size,
        "train_seconds": run.position.seconds,
        "images_per_second": run.recipe.epochs * len(run.train_indices) / run.position.seconds,
        "val_accuracy": validation.accuracy,
        "test_accuracy": recorded.accuracy,
        "test_errors": recorded.num_errors,
        "num_test": recorded.num_images,
        "test_interval": simultaneous_interval(num_right, recorded.num_images, recorded.number),
        "test_look": recorded.number,
        "num_test_looks": recorded.num_evaluations,
        "test_accuracy_of_seeds": _by_seed(ledger.of_setting(run.folder.fingerprint.setting_sha256)),
        "looks_by_dataset": ledger.counts_by_dataset(),
        "weights_sha256": weights_sha256(run.learner.model),
        "exported": None,
        "machine": describe(run.world.device),
    }


def _by_seed(entries: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Returns each seed's test accuracies, one for each of its weights that were evaluated."""
    found: dict[int, list[float]] = {}
    for entry in entries:
        found.setdefault(entry["seed"], []).append(entry["accuracy"])
    return found


def report(
    run: Run, result: dict[str, Any], test_images: ImageSet, test: Evaluation, recorded: RecordedEvaluation
) -> None:
    """Write `report.html`, and then `result.json`, with which the run is complete; tell the user.

    Raises:
        CheckpointError: they cannot be written.
    """
    from trainer.report.page import write_report  # matplotlib takes a second, which the first step need not wait for

    with writing(run.folder.path):
        write_report(run.folder.path, result, run.dataset.classes, test_images, test)
        write_json(run.folder.result_path, result)
    num_views = NUM_VIEWS[run.recipe.test_time_views]
    run.progress.say(f"test accuracy {recorded.describe(run.folder.ledger_path, num_views=num_views)}")
    run.progress.say(f"report: {run.folder.report_path}")
