"""Trials: the training runs inside a study, each trained by one rank alone in a folder below the study's.

This module trains and continues trials, on a GPU several of them side by side. Each study decides whether it uses test
images, and interprets the results.
"""

import gc
import hashlib
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch

from convoy.options import option
from convoy.processes import describe_output_error
from trainer.config import DeviceChoice, TrainConfig
from trainer.data import Dataset, without_test_images
from trainer.data.folder.options import FolderOptions
from trainer.errors import CheckpointError, ConfigError, DivergenceError, Interrupted
from trainer.loop.fit import fit
from trainer.loop.run import Run, restore
from trainer.paths import default_data_dir
from trainer.prepare import load
from trainer.progress import Progress, duration
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.checkpoint import Checkpoints
from trainer.records.fingerprint import Fingerprint
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.studies.branches import branch_key, train_side_by_side
from trainer.studies.folder import StudyFolder
from trainer.train import setup

MOST_SIDE_BY_SIDE = 64
"""On a GPU: 64 runs of a small network have three times the rate of one, and 32 nearly as much."""

SHOWN_WITHIN_S = 90.0
"""Longest time after which a network disk shows what another host has written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOptions:
    """The options of a study whose trials are trainings of one recipe."""

    recipe: Annotated[str, option("RECIPE", "mnist")] = "mnist"
    """The recipe; `convoy recipes` lists them all."""
    dataset: Annotated[str | None, option("NAME", "the recipe's")] = None
    """The data set, as for a training run."""
    image_size: Annotated[int | None, option("INT", "their own, if all are squares of one size")] = None
    """For folder:PATH only: size in pixels to which images are resized (the shorter side) and cropped to a square."""
    skip_bad_images: int = 0
    """Leave out files that cannot be decoded, up to so many, as for a training run."""
    epochs: Annotated[int | None, option("INT", "the recipe's")] = None
    """Number of epochs."""
    set: Annotated[tuple[str, ...], option("FIELD=VALUE ...", "the recipe's fields")] = ()
    """New values of the recipe's fields for all trainings, FIELD=VALUE, as for a training run."""
    network: Annotated[str | None, option("NAME", "the recipe's")] = None
    """The network, as for a training run."""
    weights: Annotated[str | None, option("FILE", "the recipe's")] = None
    """File of weights to start from, as for a training run."""
    stack: int = 0
    """Trainings side by side on a GPU, to the same result. 0: as many as its memory holds, up to 64; on CPUs 1."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder in which data sets are kept."""
    device: DeviceChoice = "auto"
    """auto uses the GPUs if there are any, one for each rank."""

    def load(self, recipe: Recipe, world: World, log: Callable[[str], None]) -> Dataset:
        """Loads a recipe's data set; see `prepare.load`."""
        options = FolderOptions(image_size=self.image_size, skip_bad_images=self.skip_bad_images)
        return load(recipe, options, self.data_dir, world, log)

    def training(self) -> TrainConfig:
        """Returns the options of a training, without --set: a study may have values of its own that come first."""
        return TrainConfig(
            recipe=self.recipe,
            dataset=self.dataset,
            epochs=self.epochs,
            network=self.network,
            weights=self.weights,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialContext:
    """The objects that all trials of a study share on one rank.

    Args:
        world: all ranks of the study.
        image_size: from the command line.
    """

    world: World
    dataset: Dataset
    image_size: int | None
    progress: Progress
    stop: StopRequest

    @property
    def single_rank(self) -> World:
        """This rank as a world of its own."""
        return replace(self.world, rank=0, size=1, control=None, store=None)


@dataclass(frozen=True, slots=True)
class Trial:
    """A training run that a study is to make."""

    recipe: Recipe
    seed: int
    path: Path


@dataclass(frozen=True, slots=True)
class TrainedTrial:
    """A trial that was trained to its end.

    Args:
        outcome: the trained run, or why the trial diverged.
        seconds: of its training; its share of those of trials that were trained side by side.
        num_together: trials that were trained side by side, itself included.
    """

    trial: Trial
    outcome: Run | DivergenceError
    seconds: float
    num_together: int = 1

    @property
    def run(self) -> Run:
        """The trained run. Raises the DivergenceError of a trial that diverged."""
        if isinstance(self.outcome, DivergenceError):
            raise self.outcome
        return self.outcome


def train_trials(
    context: TrialContext, trials: Sequence[Trial], folder: StudyFolder, *, most: int
) -> Iterator[TrainedTrial]:
    """Trains trials to the end, each to the weights that it gets alone.

    Trials that fit together are trained side by side: their recipes have one `branch_key`, and none was begun alone.

    Args:
        most: number of trials side by side; 0: as many as the GPU's memory holds, up to `MOST_SIDE_BY_SIDE`, and one on
            a CPU, which gains nothing. Always one if images are streamed.

    Raises:
        Interrupted: a signal came; the state is saved.
    """
    if context.dataset.is_streamed:
        most = 1
    if not most:
        most = MOST_SIDE_BY_SIDE if context.world.device.type == "cuda" else 1
    waiting = list(trials)
    while waiting:
        group = _next_group(waiting, most)
        try:
            yield from _train_group(context, group, folder)
        except torch.OutOfMemoryError as error:
            if len(group) == 1:
                raise ConfigError(f"the GPU's memory does not hold the trial {group[0].path.name}: {error}") from None
            most = len(group) // 2
        else:
            waiting = waiting[len(group) :]
            continue
        gc.collect()  # the runs that did not fit, which the exception held until here
        torch.cuda.empty_cache()
        print(f"{len(group)} trials side by side do not fit in the GPU's memory: trying {most}", flush=True)


def _next_group(waiting: list[Trial], most: int) -> list[Trial]:
    """Returns the next trials that may train side by side, in groups of about the same size."""
    key = branch_key(waiting[0].recipe)
    others = (number for number, trial in enumerate(waiting) if branch_key(trial.recipe) != key)
    alike = 1 if key is None else next(others, len(waiting))
    num_groups = -(-alike // most)
    return waiting[: -(-alike // num_groups)]


def _train_group(context: TrialContext, group: list[Trial], folder: StudyFolder) -> Iterator[TrainedTrial]:
    if len(group) > 1:
        runs = [open_trial(context, trial) for trial in group]
        fresh = [(trial, run) for trial, run in zip(group, runs, strict=True) if run.state.step == 0]
    else:
        fresh = []
    together: dict[Path, TrainedTrial] = {}
    if len(fresh) > 1:
        path = folder.path / _group_name([trial for trial, _ in fresh])
        checkpoints = Checkpoints(path, print)
        errors = train_side_by_side([run for _, run in fresh], checkpoints, lambda line: print(line, flush=True))
        shutil.rmtree(path, ignore_errors=True)  # each run has saved its own weights
        for (trial, run), error in zip(fresh, errors, strict=True):
            seconds = run.state.seconds
            together[trial.path] = TrainedTrial(trial, error or run, seconds, len(fresh))
    for trial in group:
        yield together.get(trial.path) or _train_alone(context, trial)


def _train_alone(context: TrialContext, trial: Trial) -> TrainedTrial:
    began = time.monotonic()
    try:
        run = open_trial(context, trial)
        fit(run, context.stop)
    except DivergenceError as error:
        return TrainedTrial(trial, error, time.monotonic() - began)
    return TrainedTrial(trial, run, run.state.seconds)


def _group_name(trials: list[Trial]) -> str:
    """Returns the name of the folder with the checkpoints of these trials."""
    names = "\n".join(trial.path.name for trial in trials)
    return f"side-by-side-{hashlib.sha256(names.encode()).hexdigest()[:12]}"


def wait_for_trials(world: World, trials: Sequence[Path], is_done: Callable[[Path], bool]) -> None:
    """Waits until every rank has trained its trials, and the main rank sees the results of all. All ranks call this.

    Raises:
        CheckpointError: a trial has no result, because somebody has removed it.
    """
    world.untimed_barrier("trials", what="train its trials")
    until = time.monotonic() + (SHOWN_WITHIN_S if world.size > 1 else 0.0)
    while world.is_main and (missing := [path for path in trials if not is_done(path)]):
        if time.monotonic() > until:
            raise CheckpointError(f"{missing[0]} has lost its result: give the same command again to train it anew")
        time.sleep(0.5)


def build_trial(context: TrialContext, trial: Trial, *, will_train: bool = True) -> Run:
    """Returns the run of a trial before its first step; writes nothing.

    Args:
        will_train: logs what the user should know of the network before a training.

    Raises:
        ConfigError: the network cannot take images of this size, or the recipe does not fit it.
    """
    folder, dataset = _planned_folder(context, trial), without_test_images(context.dataset)
    recipe = trial.recipe.as_computed_on(context.world.device)
    return setup(recipe, dataset, folder, context.single_rank, context.progress, will_train=will_train)


def check_known(context: TrialContext, trials: Iterable[Trial]) -> None:
    """Refuses trials of other images or another network, whose results would be mixed with those of new ones.

    Args:
        trials: those whose folder exists are checked.

    Raises:
        ConfigError: one is of another setting than the study's options give now.
    """
    for trial in trials:
        if (trial.path / "config.json").exists():
            _planned_folder(context, trial).check("auto", context.single_rank)


def _planned_folder(context: TrialContext, trial: Trial) -> RunFolder:
    fingerprint = Fingerprint.of(
        trial.recipe.as_computed_on(context.world.device),
        seed=trial.seed,
        image_size=context.image_size,
        dataset_sha256=context.dataset.sha256,
        virtual_shards=None,
        is_streamed=context.dataset.is_streamed,
    )
    return RunFolder(trial.path, fingerprint)


def open_trial(context: TrialContext, trial: Trial) -> Run:
    """Opens a trial's run, new or at its newest checkpoint, without training it.

    Raises:
        ConfigError: the folder belongs to another run, or as in `build_trial`.
    """
    run = build_trial(context, trial)
    run.folder.enter("auto", run.world)
    restore(run)
    return run


def describe_plan(recipes: Sequence[Recipe], num_seeds: int, details: str) -> str:
    """Returns what a study is about to train: `4 trainings of 10 epochs each: mnist on mnist, …`.

    Args:
        recipes: what is trained, each from every seed, on one data set.
        details: the end of the line.
    """
    number, epochs = len(recipes) * num_seeds, sorted({recipe.epochs for recipe in recipes})
    span = f"{epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else f"{epochs[0]}"
    return (
        f"{number} training{'s' if number > 1 else ''} of {span} epoch{'s' if epochs[-1] > 1 else ''} each: "
        f"{recipes[0].name} on {recipes[0].dataset}, {details}"
    )


def describe_left(began: float, num_done: int, num_all: int) -> str:
    """Returns how many trials are done, and how long the others will take at this rate: `1 of 4, 3 min left`.

    Args:
        began: when the first one began, by `time.monotonic`.
    """
    left = (time.monotonic() - began) / num_done * (num_all - num_done)
    return f"{num_done} of {num_all}" + (f", {duration(left)} left" if num_done < num_all else "")


@contextmanager
def explain_interruption(folder: StudyFolder) -> Iterator[None]:
    """Makes the message of an interruption say how to continue the study, instead of how to continue its trial.

    Raises:
        Interrupted: a signal came, or the output cannot be written. The study's folder holds its results so far.
    """
    try:
        yield
        return
    except Interrupted as error:
        cause, number = error.cause, error.signal_number
    except BrokenPipeError as error:
        cause, number = describe_output_error(error), signal.SIGPIPE
    raise Interrupted(cause, f"stopped; continue with the same command and --run-dir {folder.path}", number)
