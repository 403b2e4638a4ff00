"""The first phase of a run: resolves the command line and checks it on all ranks before anything is built."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from trainer.config import SourceChoice, TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.data.folder.options import FolderOptions
from trainer.errors import ConfigError, MismatchError, TrainerError
from trainer.evaluation.ledger import Ledger
from trainer.hardware import device_memory
from trainer.network_files import without_paths
from trainer.permissions import why_not_writable
from trainer.ranks.consistency import check_same, code_sha256, processor
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.fingerprint import recipe_sha256
from trainer.records.run_folder import RunFolder
from trainer.sinks import check_installed


def prepare(config: TrainConfig, world: World, log: Callable[[str], None]) -> tuple[Recipe, Dataset, RunFolder]:
    """Resolves recipe, data set and folder, and checks all that can be checked before anything is built or written.

    Returns:
        The recipe as this hardware computes it, the data set with its test images, and the folder of the run.

    Raises:
        TrainerError: the run cannot start.
    """
    if world.is_main:
        check_installed(config.log_to, config.metrics_address)
        if config.run_dir is not None and (reason := why_not_writable(config.run_dir)):
            raise ConfigError(f"--run-dir {config.run_dir}: {reason}")
    asked = config.resolve()
    recipe = asked.as_computed_on(world.device)
    if asked.precision == "tf32" != recipe.precision:
        raise ConfigError(
            f"precision tf32: the {'GPU' if world.device.type == 'cuda' else 'CPU'} of rank {world.rank} has no TF32, "
            "only NVIDIA's GPUs since Ampere have: use --precision float32"
        )
    options = FolderOptions(
        image_size=config.image_size, source=source_of(config, world), skip_bad_images=config.skip_bad_images
    )
    dataset = load(recipe, options, config.data_dir, world, log)
    folder = RunFolder.plan(config, recipe, dataset, world)
    try:
        check_same(world.all_gather_object(identity(config, recipe, dataset, world)))
    except MismatchError:
        world.failure_context.folder = folder.create_for_failure()  # so that the failure is on disk, too
        raise
    folder.check(config.resume, world)
    if world.is_main:
        Ledger(folder.ledger_path).all_entries()  # a damaged ledger is an error now, not after the training
    return recipe, dataset, folder


def identity(config: TrainConfig, recipe: Recipe, dataset: Dataset, world: World) -> dict[str, str]:
    """Returns the values that must be the same on every rank, by the names that error messages use.

    Takes this rank's own recipe and data set: the fingerprint in the folder's record is rank 0's on every rank.
    """
    return {
        **config.options_of_result(),
        "the code of the trainer": code_sha256(),
        "the version of torch": str(torch.__version__),
        "the data set": dataset.sha256,
        "--network": without_paths(recipe).network,
        "the content of --network": recipe.file_sha256.get("network", ""),
        "the content of --weights": recipe.file_sha256.get("weights", ""),
        "--precision, as the hardware has it,": recipe.precision,
        **({"the processor": processor(world.device)} if config.virtual_shards else {}),
        "the recipe": recipe_sha256(recipe),
    }


def load(recipe: Recipe, options: FolderOptions, data_dir: Path, world: World, log: Callable[[str], None]) -> Dataset:
    """Loads the data set; one process per host fetches and verifies it before the others map it.

    Args:
        options: as the user chose them; the recipe and the ranks decide the others.

    Raises:
        ConfigError: there are more ranks than images in a batch, or there is no such data set.
        DataError: the data set cannot be fetched or is damaged.
    """
    if world.size > recipe.global_batch_size:
        raise ConfigError(
            f"{world.size} ranks for a global batch of {recipe.global_batch_size}: "
            f"use at most {recipe.global_batch_size} ranks, or a larger --global-batch-size"
        )
    memory = min(world.all_gather_object(device_memory(world.device)))  # all ranks have to choose the same source
    options = replace(options, memory=memory, square=recipe.square, num_threads=world.num_cpus)
    load_it = partial(load_dataset, recipe.dataset, data_dir, log=log)
    first = load_it(options) if world.local_rank == 0 else None
    world.untimed_barrier("data", what="load the data set")  # it may take longer than a collective waits
    paths = world.all_gather_object(None if first is None else first.path)
    if first is not None:
        return first
    return load_it(replace(options, known_path=paths[world.rank - world.local_rank]), verify=False)


def source_of(config: TrainConfig, world: World) -> SourceChoice:
    """Returns the source of the run's images: a run is continued with the one that it began with."""
    known: SourceChoice | None = None
    if world.is_main and config.source == "auto" and config.run_dir is not None:
        with suppress(TrainerError):  # there is no such run; or it is damaged, which is told later
            known = RunFolder.read(config.run_dir).fingerprint.source
    return world.broadcast_object(known) or config.source
