"""A training run, from a command line to a report. `train` is its table of contents.

    prepare -> setup -> restore -> fit -> evaluate -> export -> report

`loop.step` computes a step, `ranks.world` connects the ranks, `data` loads images, and `results` evaluates and reports.
"""

from functools import partial

import torch

from convoy.allocator import keep_freed_memory
from trainer.config import TrainConfig
from trainer.data import Dataset, without_test_images
from trainer.data.split import stratified_split
from trainer.errors import ConfigError, writing
from trainer.export.plan import ExportPlan, check_complete, export_trained, plan_export
from trainer.loop.fit import fit
from trainer.loop.learner import build_learner
from trainer.loop.rehearsal import compile_ahead, start_compilers
from trainer.loop.run import Run, TrainState, restore, restore_final_weights
from trainer.loop.saving import SaveInterval
from trainer.models import num_parameters
from trainer.paths import CHECKPOINTS, image_folder
from trainer.prepare import prepare
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.recipes.advice import DatasetSize, advise, describe_batch
from trainer.recipes.augmentation import check_shift
from trainer.recipes.files import load_recipe
from trainer.records.checkpoint import Checkpoints
from trainer.records.run_folder import RunFolder
from trainer.results import evaluate_on_test_set, import_for_report, report, show_results, summarize, validate
from trainer.signals import StopRequest

SPLIT_SEED = 0
"""Fixed, so that runs with different seeds are validated on the same images."""


def train(config: TrainConfig) -> None:
    """Trains a run to its end. Writes to the run folder, the ledger and the model repository only.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    keep_freed_memory()
    with (
        StopRequest() as stop,
        World.join(
            config.device,
            config.virtual_shards,
            grad_accumulation=config.grad_accumulation,
            gradient_reduction=config.gradient_reduction,
            hang_timeout_s=config.hang_timeout_s,
            allow_shared_gpu=config.allow_shared_gpu,
        ) as world,
        Progress(is_main=world.is_main, stop=stop) as progress,
    ):
        compilation = start_compilers(world)  # in the background, while data are read
        recipe, dataset, folder = prepare(config, world, progress.log)
        if check_complete(folder, config, world, progress.log):
            return
        will_train = not folder.is_complete(world)  # a complete run is left to publish
        run = setup(recipe, without_test_images(dataset), folder, world, progress, will_train=will_train)
        if will_train:
            log_setup(run, load_recipe(config.recipe).global_batch_size)
            if compilation is not None:
                compile_ahead(run, compilation)
        planned = plan_export(run, config)
        with folder.entered(config.resume, world, progress.log):
            # Again: the process that used the folder before may have completed the run.
            if check_complete(folder, config, world, progress.log):
                return
            if folder.is_complete(world):
                export_complete(run, planned)
            else:
                train_to_report(run, dataset, config, planned, stop)
            world.untimed_barrier("end")


def train_to_report(
    run: Run, dataset: Dataset, config: TrainConfig, planned: ExportPlan | None, stop: StopRequest
) -> None:
    """Trains from the newest checkpoint, or from the start, to the run's report. All ranks call this.

    Args:
        dataset: the run's data set with its test images.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    log = run.progress.log
    if run.world.is_main:
        run.folder.keep_settings(config, run.recipe)
    if restore(run):
        log(f"continuing at step {run.state.step} of {run.num_steps}, saved in {run.folder.path}")
    else:
        mirroring, num_shards = config.chooses_mirroring, run.world.num_shards
        for line in advise(run.recipe, dataset_size(run), is_mirroring_chosen=mirroring, num_shards=num_shards):
            log(line)
    if run.kernels is not None and run.world.is_main:
        import_for_report()  # while kernels are compiled
    with run.open_sinks(config.log_to, config.metrics_address) as sinks:
        fit(run, stop, SaveInterval(seconds=config.save_every_s, steps=config.save_every_steps), sinks)
        validation = validate(run)
        test_images, test, recorded = evaluate_on_test_set(run, dataset)
        if recorded is not None:
            show_results(run, validation, recorded, sinks)
    if recorded is not None:  # on the main rank
        result = summarize(run, validation, test, recorded)
        try:
            result = export_trained(run, planned, result)
        except Exception:  # the run is complete, whether or not its model is published
            report(run, result, test_images, test, recorded)
            raise
        report(run, result, test_images, test, recorded)


def export_complete(run: Run, planned: ExportPlan | None) -> None:
    """Publishes the model of a complete run whose export failed before. All ranks call this.

    Raises:
        CheckpointError: the checkpoint with the run's final weights is damaged or gone.
        ExportError: as in `export_trained`.
    """
    result = run.folder.result()
    restore_final_weights(run)
    if run.world.is_main and result is not None:
        run.progress.log(f"{run.folder.path} is complete but not exported")
        result = export_trained(run, planned, result)
        with writing(run.folder.path):
            result.write(run.folder.result_path)


def setup(
    recipe: Recipe,
    dataset: Dataset,
    folder: RunFolder,
    world: World,
    progress: Progress,
    *,
    will_train: bool = True,
) -> Run:
    """Splits the training images and builds the learner.

    Args:
        will_train: logs what the user should know of the network before a training, and compiles its steps.

    Raises:
        ConfigError: the recipe is not for images of this size.
    """
    check_shift(recipe.augment, dataset.train.shape[1])
    if recipe.num_validation == 0 and dataset.validation is not None:
        raise ConfigError(
            f"num_validation 0: {dataset.name} has a folder of validation images: move them to the training images to "
            "train on them"
        )
    if dataset.validation is not None:
        validation_images = dataset.validation
        train_indices, validation_indices = torch.arange(len(dataset.train)), torch.arange(len(validation_images))
    else:
        validation_images = dataset.train
        num_validation = min(recipe.num_validation, max(1, len(dataset.train) // 10))
        train_indices, validation_indices = stratified_split(dataset.train.labels, num_validation, SPLIT_SEED)
    seed, is_compiled = folder.fingerprint.seed, will_train and folder.fingerprint.is_compiled
    log = progress.log if will_train else lambda _line: None
    return Run(
        recipe=recipe,
        seed=seed,
        dataset=dataset,
        train_indices=train_indices,
        validation_images=validation_images,
        validation_indices=validation_indices,
        learner=build_learner(recipe, dataset, train_indices, seed, world, log, is_compiled=is_compiled),
        folder=folder,
        checkpoints=Checkpoints(folder.path / CHECKPOINTS, progress.log, partial(folder.write_config, world)),
        world=world,
        progress=progress,
        state=TrainState(totals=torch.zeros(2, dtype=torch.float64, device=world.device)),
    )


def log_setup(run: Run, usual_batch_size: int) -> None:
    """Logs the data set, the network, the ranks and the run folder.

    Args:
        usual_batch_size: the recipe's own global batch.
    """
    recipe, dataset, world, log = run.recipe, run.dataset, run.world, run.progress.log
    num_validation = f"{len(run.validation_indices):,}" if run.has_validation else "no"
    log(
        f"{recipe.name} on {dataset.name}: {len(dataset.classes):,} classes; {len(run.train_indices):,} training, "
        f"{num_validation} validation and {dataset.num_test:,} test images, "
        f"{'streamed' if dataset.is_streamed else 'resident'}; "
        f"{num_parameters(run.learner.model):,} parameters, {run.learner.precision}"
    )
    parts = f", in {world.grad_accumulation} parts a rank" if world.grad_accumulation > 1 else ""
    sent = " in bfloat16" if world.gradient_reduction == "ddp-bfloat16" else ""
    ddp = f", gradients added up by DDP{sent}" if world.uses_ddp else ""
    log(
        f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}, {world.num_threads} "
        f"thread{'s' if world.num_threads > 1 else ''} each; "
        f"{describe_batch(recipe, usual_batch_size)}{parts}{ddp}; run folder {run.folder.path}"
    )
    if world.num_computing < world.size:
        log(
            f"{world.size} ranks do not divide {world.virtual_shards} virtual shards: {world.num_computing} compute, "
            f"{world.size - world.num_computing} are spares"
        )


def dataset_size(run: Run) -> DatasetSize:
    """Returns the size of the run's data set, as advice on its recipe needs it."""
    labels, classes = run.dataset.train.labels[run.train_indices], run.dataset.classes
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    return DatasetSize(
        is_folder=image_folder(run.recipe.dataset) is not None,
        num_channels=run.dataset.train.shape[0],
        num_training_by_class=dict(zip(classes, counts, strict=True)),
        num_validation=len(run.validation_indices),
    )
