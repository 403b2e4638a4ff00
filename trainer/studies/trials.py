"""Trials: the training runs inside a study, each trained by one rank alone in a folder below the study's.

This module trains and continues trials. Each study decides whether it uses test images, and interprets the results.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from convoy.processes import describe_output_error
from trainer.data import Dataset, without_test_images
from trainer.errors import Interrupted
from trainer.loop.fit import fit
from trainer.loop.run import Run, restore
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.fingerprint import Fingerprint
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.train import setup


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


def open_trial(context: TrialContext, recipe: Recipe, seed: int, path: Path) -> Run:
    """Opens the run in a folder, new or at its newest checkpoint, without training it.

    Raises:
        ConfigError: the folder belongs to another run, or the network cannot take images of this size.
    """
    recipe = recipe.as_computed_on(context.world.device)
    fingerprint = Fingerprint.of(
        recipe,
        seed=seed,
        image_size=context.image_size,
        dataset_sha256=context.dataset.sha256,
        virtual_shards=None,
        is_streamed=context.dataset.is_streamed,
    )
    folder, world = RunFolder(path, fingerprint), context.single_rank
    run = setup(recipe, without_test_images(context.dataset), folder, world, context.progress)
    run.folder.enter("auto", world)
    restore(run)
    return run


def train_trial(context: TrialContext, recipe: Recipe, seed: int, path: Path) -> Run:
    """Opens the run in a folder and trains it to the end.

    Raises:
        Interrupted: a signal came; the state is saved.
        DivergenceError: a loss is not finite.
    """
    run = open_trial(context, recipe, seed, path)
    fit(run, context.stop)
    return run


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
