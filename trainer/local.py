"""`convoy train [PATH-OR-RECIPE]`: one training run on this machine, with one process for each GPU."""

import math
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, NoReturn

import tyro

from convoy.options import option
from trainer.advice import choose_batch_and_epochs, has_few_steps
from trainer.cli import parse, read_command_line, run_command
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.paths import FOLDER_PREFIX, image_folder
from trainer.ranks.environment import RankEnvironment
from trainer.recipes import RECIPES, find_recipe

FOLDER_RECIPE = "cifar10-small"
FOLDER_IMAGE_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTrainConfig:
    """Trains on this machine, with one process for each GPU, or one process for all CPUs."""

    path_or_recipe: Annotated[
        str | None,
        tyro.conf.Positional,
        option("[PATH-OR-RECIPE]", "the recipe mnist"),
    ] = None
    """A folder of images with one folder for each class, or the name of a recipe."""
    nproc: Annotated[int | None, option("N", "one for each GPU, or 1")] = None
    """Number of processes, which are the ranks of the run."""
    run: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainConfig)


def local_train_command(arguments: Sequence[str]) -> NoReturn:
    """Runs `convoy train`, in this process or, for several ranks, by torchrun in its place."""
    line = read_command_line(arguments)
    config = parse(LocalTrainConfig, line.arguments, prog="convoy train", default=LocalTrainConfig(run=line.default))
    run_command(lambda: _train(replace(config, run=line.combine(config.run)), line.given))


def _train(config: LocalTrainConfig, given: Collection[str]) -> None:
    run, choice = resolve(config, given)
    run.resolve()  # a faulty command line must not wait for several processes to start
    environment = RankEnvironment.read()
    if choice and environment.is_main:
        print(choice, flush=True)
    if not environment.is_launched:  # else this is one of torchrun's ranks
        num_ranks = config.nproc or _num_gpus(run)
        if num_ranks > 1:
            _exec_torchrun(num_ranks, run)
    from trainer.train import train

    train(run)


def resolve(config: LocalTrainConfig, given: Collection[str]) -> tuple[TrainConfig, str]:
    """Returns the run that the command line asks for, and a line with the values that Convoy chose, or "".

    Args:
        given: the names of the options on the command line, such as `--recipe`.

    Raises:
        ConfigError: the positional argument is neither a folder nor a recipe, or an option contradicts it.
    """
    path_or_recipe, run = config.path_or_recipe, config.run
    if config.nproc is not None and config.nproc < 1:
        raise ConfigError(f"--nproc {config.nproc}: must be at least 1")
    if path_or_recipe is None:
        return run, ""
    if path_or_recipe in RECIPES or not os.path.isdir(path_or_recipe):
        if "--recipe" in given:
            raise ConfigError(f"{path_or_recipe} and --recipe {run.recipe}: give one recipe")
        if os.sep in path_or_recipe:
            raise ConfigError(f"{path_or_recipe}: no such folder")
        try:
            return replace(run, recipe=find_recipe(path_or_recipe).name), ""
        except ConfigError as error:
            raise ConfigError(f"no such folder, and {error}") from None
    if "--dataset" in given:
        raise ConfigError(f"{path_or_recipe} and --dataset {run.dataset}: give one data set")
    return _resolve_folder(replace(run, dataset=f"{FOLDER_PREFIX}{path_or_recipe}"), given)


def _resolve_folder(run: TrainConfig, given: Collection[str]) -> tuple[TrainConfig, str]:
    if "--image-size" not in given:
        run = replace(run, image_size=FOLDER_IMAGE_SIZE)
    if "--recipe" not in given:
        run = replace(run, recipe=FOLDER_RECIPE)
    if run.epochs is None:
        run = _fit_to_folder(run)
    recipe, size = run.resolve(), run.image_size
    return run, (
        f"{recipe.dataset}: recipe {recipe.name}, {recipe.epochs} epochs, {recipe.global_batch_size} images per step, "
        f"images of {size} x {size} pixels (--recipe, --epochs, --global-batch-size and --image-size choose others)"
    )


def _fit_to_folder(run: TrainConfig) -> TrainConfig:
    """Returns the run with a global batch and epochs that suit the folder, if it is too small for the recipe's."""
    recipe, num_images = run.resolve(), _estimate_training_images(run)
    if not has_few_steps(recipe, num_images):
        return run
    batch_size, epochs = choose_batch_and_epochs(find_recipe(run.recipe), num_images, batch_size=run.global_batch_size)
    return replace(run, global_batch_size=max(batch_size, run.virtual_shards or 1), epochs=epochs)


def _estimate_training_images(run: TrainConfig) -> int:
    """Returns the number of training images of a folder: about a tenth is held out for each missing split."""
    from trainer.data.folder.listing import list_folder

    root = image_folder(run.resolve().dataset)
    assert root is not None
    splits = list_folder(root).splits
    num_missing = 2 - ("validation" in splits) - ("test" in splits)
    return math.ceil(len(splits["train"]) * 0.9**num_missing)


def as_arguments(config: TrainConfig) -> Iterator[str]:
    """Yields the command line that is read as this value."""
    default = TrainConfig()
    for setting in fields(config):
        value = getattr(config, setting.name)
        flag = setting.name.replace("_", "-")
        if value == getattr(default, setting.name):
            continue
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, tuple):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))


def _num_gpus(run: TrainConfig) -> int:
    if run.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _exec_torchrun(num_ranks: int, run: TrainConfig) -> NoReturn:
    launcher = ["-m", "trainer.launch", "--standalone", f"--nproc-per-node={num_ranks}", "-m", "trainer.main"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # only silences torchrun's warning: each rank sets its own threads
    os.execv(sys.executable, [sys.executable, *launcher, *as_arguments(run)])
